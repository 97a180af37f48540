"""Words that messages and pages share."""

from onlinenorm.text import duration, first_line, plural


def test_durations_have_their_two_largest_units():
    assert [duration(s) for s in (-1, 9.4, 75, 3599.6, 3675, 90_000)] == [
        "0 s", "9 s", "1 min 15 s", "1 h 0 min", "1 h 1 min", "25 h 0 min",
    ]  # fmt: skip


def test_one_of_a_thing_is_singular():
    assert [plural(n, "epoch") for n in (0, 1, 2, 1200)] == ["0 epochs", "1 epoch", "2 epochs", "1,200 epochs"]


def test_of_an_error_without_a_message_its_class_is_named():
    assert first_line(ValueError("\n a line\nadvice to programmers")) == "a line"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
