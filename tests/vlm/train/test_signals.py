import signal

import pytest

from vlm.train.signals import stop_on_signal


def test_the_first_ctrl_c_says_what_a_second_would_do(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signal(tell=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_scheduler_is_told_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signal(tell=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert capfd.readouterr().err == ""
