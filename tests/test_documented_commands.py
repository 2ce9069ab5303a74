"""The commands in the READMEs, in the scripts' docstrings and in the YAML files' comments still compose."""

import ast
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tiny import ROOT, config_dir

from utils.settings import name_group

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
READMES = ["README.md", "data/README.md", "checkpoints/README.md", "benchmarks/README.md"]


def documented_commands() -> dict[str, list[list[str]]]:
    """The arguments of all documented commands, by script; what stands in <> becomes a plain word."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in READMES]
    texts += [ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))) for name in SCRIPTS]
    texts += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    commands = {script: [] for script in SCRIPTS}
    for text in texts:
        text = re.sub(r" \w+=<\w+>|--cfg job| \.\.\.", "", text)  # data=<name>: any of them
        text = re.sub(r"<[^<>\n]+>", "x", text)
        for script, rest in re.findall(r"(?:python|torchrun(?: --\S+)*) (\w+)\.py((?: [^\s`#']+)*)", text):
            if (arguments := shlex.split(rest)) not in commands[script]:
                commands[script].append(arguments)
    return commands


COMMANDS = documented_commands()


def test_commands_are_found():
    assert {script: len(commands) >= 5 for script, commands in COMMANDS.items()} == dict.fromkeys(SCRIPTS, True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_documented_commands_compose(script):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir(script)), version_base="1.3"):
        for arguments in COMMANDS[script]:
            if "--multirun" in arguments:  # its first run, without what starts the runs
                arguments = [word.split(",")[0] for word in arguments if not word.startswith(("-", "hydra"))]
            try:
                compose(script, [name_group(argument) for argument in arguments])
            except Exception as error:
                pytest.fail(f"python {script}.py {shlex.join(arguments)}: {error}")
