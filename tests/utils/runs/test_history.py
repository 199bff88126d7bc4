"""Which losses are those of a diverging run."""

from utils.runs.history import LossMonitor


def test_a_loss_is_normal_up_to_three_times_the_median():
    monitor = LossMonitor()
    assert [monitor.add(loss) for loss in (5.0, 4.0, 3.0, 11.9, 13.6, 1e9, float("nan"), float("inf"), 3.0)] == \
        [True, True, True, True, False, False, False, False, True]
    for _ in range(300):
        monitor.add(1.0)
    assert monitor.normal and not monitor.add(3.1)
