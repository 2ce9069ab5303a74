"""What is drawn over frames and on sheets: colours, words and places."""

import numpy as np
from matplotlib.figure import Figure
from tiny_tracking import make_sequence

from utils.tracking.drawing import draw_boxes, draw_response, draw_sheet, plot_curves, plot_scores


def test_what_is_drawn():
    frame = np.full((100, 150, 3), 90, np.uint8)
    boxes = np.array([[30, 40, 20, 30], [100, 20, 30, 60]], np.float64)
    drawn = draw_boxes(frame, boxes, np.array([1.0, 0.2]), np.array([False, True]))
    assert (frame == 90).all()
    found_color, lost_color = drawn[55, 30].astype(int), drawn[50, 100].astype(int)  # middles of the left sides
    assert np.ptp(found_color) > 100 and np.ptp(lost_color) < 10 and lost_color[0] > 120  # colour; grey
    assert np.abs(drawn[55, 49].astype(int) - found_color).max() < 60  # and of the right side: the last pixel of 20
    assert (drawn[70:, 60:90] == 90).all()
    again = draw_boxes(frame, boxes, np.array([1.0, 0.2]), np.array([False, False]))
    words = np.flatnonzero((drawn[:20] != again[:20]).any((0, 2)))
    assert len(words) and words.max() - words.min() > 30  # "2 0.20 lost" above the second box
    for box in ([-1e9, -1e9, 2e9, 2e9], [140, 95, 500, 3]):
        draw_boxes(frame, np.array([box]), np.array([np.nan]), np.array([True]))  # anywhere
    absent = draw_boxes(frame, np.full((1, 4), np.nan), np.array([np.nan]), np.array([True]))  # it starts later
    assert np.array_equal(absent, frame)


def test_contact_sheet_and_its_colours():
    frames = {index: np.full((48, 64, 3), 90, np.uint8) for index in (0, 3, 5)}
    truth, boxes = np.tile([10.0, 10, 20, 20], (6, 1)), np.tile([30.0, 20, 20, 20], (6, 1))
    truth[5] = np.nan
    sheet = draw_sheet(frames, boxes, truth)
    assert sheet.shape == (240, 3 * 320, 3)
    is_green = (sheet[..., 1].astype(int) - sheet[..., 0] > 80).any(0)
    is_red = (sheet[..., 0].astype(int) - sheet[..., 1] > 80).any(0)
    assert [is_green[k * 320 : k * 320 + 320].any() for k in range(3)] == [True, True, False]
    assert [is_red[k * 320 : k * 320 + 320].any() for k in range(3)] == [True] * 3
    assert abs(np.flatnonzero(is_green)[0] - 50) < 4 and abs(np.flatnonzero(is_red)[0] - 150) < 4  # 5 times as large


def test_the_response_lies_over_what_was_searched():
    """The peak is red at its place in the corner, all else of the picture is as it was."""
    rng = np.random.default_rng(0)
    frame = rng.integers(60, 90, (240, 300, 3)).astype(np.uint8)
    response = np.full((17, 17), -3.0, np.float32)
    response[4, 12] = 5.0  # above and to the right of the middle
    drawn = frame.copy()
    draw_response(drawn, frame, np.array([150, 120], np.float32), 200.0, response)
    assert np.array_equal(drawn[80:], frame[80:]) and np.array_equal(drawn[:, 80:], frame[:, 80:])
    inset = drawn[:80, :80].astype(int)
    reddest = np.unravel_index((inset[1:-1, 1:-1, 0] - inset[1:-1, 1:-1, 2]).argmax(), (78, 78))
    expected = [(127 + 8 * (place - 8)) * 80 / 255 - 1 for place in (4, 12)]
    assert np.abs(np.array(reddest) - expected).max() <= 2


def test_names_of_plots_are_no_formulas(tmp_path, monkeypatch):
    """matplotlib takes what is between two $ for a formula, and leaves a name that starts with _ out of the legend."""
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, dpi: (figure.draw_without_rendering(), drawn.append(figure))
    )
    row = {"sequence": "mean of 1", "success_auc": 0.5, "precision_20": 0.5}
    row |= {"success_curve": np.zeros(21), "precision_curve": np.zeros(51)}
    plot_curves([row | {"tracker": name} for name in ("_old", "c$50_vs_$")], "got10k", tmp_path)
    texts = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert texts == ["_old [0.500]", "c$50_vs_$ [0.500]"]
    boxes = np.tile([10.0, 10, 20, 20], (2, 1))
    plot_scores(boxes, np.ones(2), np.zeros(2, bool), make_sequence(boxes, name="c$50_vs_$"), tmp_path / "a.png")
