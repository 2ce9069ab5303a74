"""The command line of the five scripts: paths as they are, what Hydra cannot read, printed commands, Ctrl-C."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_python
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from options import CONFIGS

from utils import settings

NAMES = [
    "photo.jpg", "IMG (2).jpg", "a,b.png", "x=3.png", "~draft.png", "it's.png", 'say "hi".png', "über.png", "照片.png",
    "été 2024/café.png", "[1].png", "{a}.png", "a:b.png", "100%.png", "a&b;c.png", "back\\slash.png", "ends\\'",
    "@home.png", "#1.png", "  two  spaces .png", "$HOME.png", "a*b?.png", "2024", "true", "1e3", "null.png", "a|b.png",
    "-dash.png", "tab\there.png", "!x.png", "`date`.png", "e\u0301.png", "'half.png", "key: value.png", "\\'",
]  # fmt: skip


def read_by_hydra(argument: str):
    """What the script's config holds of an argument of infer_sam2.py."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS / "sam2"), version_base="1.3"):
        return compose("infer_sam2", [argument])[argument.split("=")[0]]


def on_command_line(monkeypatch, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["infer_sam2.py", *arguments])
    settings.read_command_line("sam2")
    return sys.argv[1:]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_is(name, monkeypatch):
    """13 of 17 ordinary names ended in four lines of Hydra's parser."""
    (argument,) = on_command_line(monkeypatch, f"input={name}")
    assert read_by_hydra(argument) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_command_runs_when_pasted(name, monkeypatch):
    command = settings.show_command("infer_sam2.py", input=name, checkpoint="out (1)/best.pt")
    command = command.replace(
        "python infer_sam2.py", shlex.join([sys.executable, "-c", "import sys; print(sys.argv[1:])"])
    )
    arguments = eval(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)
    read = [read_by_hydra(argument) for argument in on_command_line(monkeypatch, *arguments)]
    assert read == [name, "out (1)/best.pt"]


@pytest.mark.parametrize("name", ["null", "'quoted'", '"quoted"', "[1,2]"])
def test_a_printed_command_quotes_what_hydra_would_read_otherwise(name, monkeypatch):
    argument = shlex.split(settings.show_command("infer_sam2.py", input=name))[-1]
    (argument,) = on_command_line(monkeypatch, argument)
    assert read_by_hydra(argument) == name


def test_what_is_quoted_for_hydra_or_null_means_the_same_as_before(monkeypatch):
    given = ["input='a b.jpg'", 'region="c,d.png"', "checkpoint=null", "mode=automatic", "overlay=false"]
    assert on_command_line(monkeypatch, *given) == given
    assert [read_by_hydra(argument) for argument in given[:3]] == ["a b.jpg", "c,d.png", None]
    given = ["data_root=${oc.env:HOME}/x", "+data.root=a b", "hydra.run.dir=x/${now:%Y}"]
    quoted = ["data_root='${oc.env:HOME}/x'", "+data.root='a b'", "hydra.run.dir='x/${now:%Y}'"]
    assert on_command_line(monkeypatch, *given) == quoted


def test_a_path_of_a_second_dataset_is_one_and_false_is_none(monkeypatch):
    """cache=false made a folder of that name, and kept embeddings in it."""
    given = ["general_data.root=a (2)", "data.val_sequences=b,c.txt", "data.annotations=d (1).xml", "cache=False"]
    read = [argument.split("=")[1] for argument in on_command_line(monkeypatch, *given)]
    assert read == ["'a (2)'", "'b,c.txt'", "'d (1).xml'", "False"]


def test_keys_that_are_no_path_and_multirun_stay_hydras(monkeypatch):
    given = ["train.eval_images=0", "-m", "input=a.png,b.png", "points=[[3,4]]"]
    assert on_command_line(monkeypatch, *given) == given


@pytest.mark.parametrize("arguments", [["--multirun", "input=IMG (2).jpg"], ["points=[[3,4]"], ["split=a(b"]])
def test_what_hydra_cannot_read_is_one_line_that_says_how_to_quote(arguments, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        on_command_line(monkeypatch, *arguments)
    key, value = arguments[-1].split("=")
    quoted = shlex.quote(f"{key}='{value}'")
    assert (
        stop.value.code
        == f"error: Hydra cannot read {arguments[-1]}; quote the value, for the shell and for Hydra: {quoted}"
    )


def test_a_list_that_hydra_cannot_read_stays_one_where_it_is_quoted_as_it_says(monkeypatch):
    with pytest.raises(SystemExit) as stop:
        on_command_line(monkeypatch, "results=[IMG (2)/a, 'b']")
    (argument,) = on_command_line(monkeypatch, *shlex.split(stop.value.code.split("for Hydra: ")[1]))
    assert read_by_hydra(argument) == ["IMG (2)/a", "b"]


@pytest.mark.parametrize("key", ["input", "labels", "checkpoint", "hydra.run.dir", "data.root"])
def test_a_path_without_a_value_is_not_the_current_folder(key, monkeypatch):
    with pytest.raises(SystemExit, match=f"{key}= has no value"):
        on_command_line(monkeypatch, f"{key}=")
    assert on_command_line(monkeypatch, "data.image_dir=") == ["data.image_dir="]


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for argument in (f"hydra.run.dir={tmp_path / 'file' / 'run'}", f"hydra.run.dir={tmp_path}/no/run"):
        monkeypatch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(SystemExit, match="is not a folder that may be written; give hydra.run.dir="):
            on_command_line(monkeypatch, argument)
        for flags in (["--cfg", "job"], ["--cfg=job"], ["-c", "all"], ["--info"], ["--hydra-help"]):
            on_command_line(monkeypatch, argument, *flags)  # nothing is written


@pytest.mark.parametrize("script, task", [("train_sam2", "sam2"), ("train_unet", "unet"), ("track", "tracking")])
def test_a_folder_of_data_without_its_layout_is_not_the_place_of_generated_data(script, task, monkeypatch):
    """Runs ended well, on generated pictures: the default had been drawn at a path of the user's that was not there."""

    def read(*arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "data.root=my/cells", *arguments])
        settings.read_command_line(task)

    with pytest.raises(SystemExit, match=r"data.root=.?my/cells.? is given without data=, .*: data=\w+\|"):
        read("seed=1")
    for said in ("data=coco", "resume=run", "experiment=x", "data.generate=null"):
        read(said)


def test_a_folder_that_has_a_run_is_refused_before_anything_is_written_there(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    argument = f"hydra.run.dir={tmp_path}"
    with pytest.raises(SystemExit, match="run.json exists; a run needs a folder of its own"):
        on_command_line(monkeypatch, argument)
    on_command_line(monkeypatch, argument, "--cfg", "job")


def test_a_printed_command_names_the_script_from_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = settings.Path(settings.__file__).parent.parent / "train_unet.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert settings.show_command("track.py", input="a") == f"python {script.parent}/track.py input=a"


def test_a_run_of_a_sweep_that_fails_does_not_end_the_others(monkeypatch, capsys):
    """Hydra goes on after an error, not after sys.exit: one combination beyond all memory ended the night's sweep."""
    monkeypatch.setattr(settings.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(settings.HydraConfig, "get", lambda: type("Hydra", (), {"mode": settings.RunMode.MULTIRUN}))
    with pytest.raises(ValueError), settings.one_line_errors("train_unet", "less"):
        raise ValueError("optim.lr is 0; must be above 0")
    assert capsys.readouterr().err == "error: optim.lr is 0; must be above 0\n"


@pytest.mark.parametrize("has_saved", [True, False])
def test_ctrl_c_is_one_line_with_the_command_that_goes_on(has_saved, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "out (1)"
    run_dir.mkdir()
    if has_saved:
        (run_dir / "last.pt").write_bytes(b"")
    runtime = type("Runtime", (), {"output_dir": str(run_dir)})
    monkeypatch.setattr(settings.HydraConfig, "get", lambda: type("Hydra", (), {"runtime": runtime}))
    with pytest.raises(SystemExit) as stop, settings.one_line_errors("train_unet", "less"):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    message = capsys.readouterr().err
    if has_saved:
        command = shlex.join(["python", "train_unet.py", f"resume={run_dir}"])
        assert message == f"interrupted; {run_dir}/last.pt is saved, go on with: {command}\n"
    else:
        assert message == f"interrupted; what was finished is in {run_dir}\n"


def test_folders_of_labels_objects_and_masks_models_are_paths_too(monkeypatch):
    """Each in the script that has it; `name_group` and Hydra's grammar leave them as they are."""
    given = {"sam2": ["labels", "data.labels", "model.checkpoint"], "tracking": ["objects", "sam2.checkpoint", "input"]}
    for task, keys in given.items():
        monkeypatch.setattr(sys, "argv", ["script.py", *(f"{key}=my engine (1), été" for key in keys)])
        settings.read_command_line(task)
        assert sys.argv[1:] == [f"{key}='my engine (1), été'" for key in keys]


def test_a_value_that_must_be_given_is_named_in_one_line(monkeypatch):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS / "sam2"), version_base="1.3"):
        cfg = compose("train_sam2", ["experiment=data_engine", "data.root=photos"])
    with pytest.raises(SystemExit, match="^error: data.labels is not given; add data.labels=<value>"):
        with settings.one_line_errors("train_sam2", "less"):
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.slow
def test_a_name_of_every_sort_passes_a_real_script(tmp_path):
    """The message of a file that is not there shows what the script got."""
    name = "IMG (2), it's=é 照.jpg"
    arguments = f"input={tmp_path / name}", f"hydra.run.dir={tmp_path / 'a (b)'}"
    done = run_python("infer_sam2.py", *arguments, cwd=Path(settings.__file__).parents[1])
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
        f"error: input {tmp_path / name} does not exist"
    )


@pytest.mark.parametrize("script", ["train_sam2", "infer_sam2", "train_unet", "train_siamfc", "track"])
def test_ctrl_c_while_a_script_is_still_loading_is_no_traceback(script, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-v", str(CONFIGS.parent / f"{script}.py"), "data.root=absent"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:  # -v names each import
        if line.startswith("import 'torch"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors
