"""The automatic window grows for the link's delay, and for nothing else."""

from dnipipe.window import Window


def test_a_fixed_window_stays() -> None:
    window = Window(3)
    window.answered(starved=True, blocked=True)
    assert window.size == 3


def test_it_grows_only_if_both_ends_were_idle() -> None:
    for starved, blocked in ((True, False), (False, True), (False, False)):
        window = Window(None)
        for _ in range(50):
            window.answered(starved=starved, blocked=blocked)
        assert window.size == Window.START


def test_it_grows_to_cover_a_delay_and_settles() -> None:
    """A link that holds 20 batches: while the window is smaller, a round trip leaves both ends idle once."""
    window = Window(None)
    for _ in range(20):
        covered = window.size >= 20
        window.answered(starved=not covered, blocked=not covered)
        for _ in range(window.size):
            window.answered(starved=False, blocked=False)
    assert 20 <= window.size < 40


def test_it_stops_at_the_limit() -> None:
    window = Window(None, limit=5)
    for _ in range(200):
        window.answered(starved=True, blocked=True)
    assert window.size == 5
