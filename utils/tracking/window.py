"""The window of track.py, for box=select and show=true; nothing else needs a screen."""

import numpy as np


def check_screen(key: str) -> None:
    """Stop where matplotlib cannot show windows."""
    from matplotlib import pyplot

    try:
        figure = pyplot.figure()
        framework = figure.canvas.required_interactive_framework  # None of a backend that only writes files
        pyplot.close(figure)
    except ImportError:  # a backend was asked for that does not work here
        framework = None
    if framework is None:
        raise ValueError(
            f"{key} opens a window, which matplotlib (backend {pyplot.get_backend()}) cannot do here: it needs a "
            "screen and tkinter, PyQt or the like; without them give 'box=[x,y,width,height]', and leave out show="
        )


def select_box(frame: np.ndarray, title: str) -> np.ndarray:
    """Let the user draw a box with the mouse.

    Args:
        frame: uint8 (H, W, 3) RGB.
    Returns:
        box_xywh float64 (4,) px, 0-based.
    Raises:
        ValueError: where none was drawn.
    """
    from matplotlib import pyplot
    from matplotlib.widgets import RectangleSelector

    figure, ax = pyplot.subplots()
    ax.imshow(frame)
    title = f"{title}\ndraw a box around the object, then press Enter or close the window"
    ax.set_title(title, fontsize="small", parse_math=False)  # a path may have two $
    selector = RectangleSelector(ax, lambda press, release: None, interactive=True)
    figure.canvas.mpl_connect("key_press_event", lambda event: event.key == "enter" and pyplot.close(figure))
    pyplot.show(block=True)
    x1, x2, y1, y2 = (float(value) for value in selector.extents)
    if not (x2 > x1 and y2 > y1):
        raise ValueError("box=select: no box was drawn; draw one, or give 'box=[x,y,width,height]'")
    return np.array([x1 + 0.5, y1 + 0.5, x2 - x1, y2 - y1])  # matplotlib's pixel (0, 0) reaches from -0.5 to 0.5


def open_window(title: str):
    """Open a window for `show_image`."""
    from matplotlib import pyplot

    figure = pyplot.figure(title)
    figure.add_axes([0, 0, 1, 1]).set_axis_off()
    pyplot.show(block=False)
    return figure


def show_image(window, image_rgb: np.ndarray) -> None:
    """Show a picture in a window; once the user has closed it, nothing."""
    from matplotlib import pyplot

    if not pyplot.fignum_exists(window.number):
        return
    (ax,) = window.axes
    if ax.images and ax.images[0].get_size() == image_rgb.shape[:2]:
        ax.images[0].set_data(image_rgb)
    else:
        for shown in list(ax.images):
            shown.remove()
        ax.imshow(image_rgb)
    pyplot.pause(0.001)


def close_window(window) -> None:
    """Close a window, if the user has not."""
    from matplotlib import pyplot

    pyplot.close(window)
