from __future__ import annotations

import json
import math

import numpy as np
import pytest

from clipfast.visualize.training_curves import plot_training_curves, read_log

HISTORY = [
    {"step": i, "loss": 5.0 / i, "logit_scale": 14.0 + i, "learning_rate": 1e-3, "samples_per_second": 100.0 + i}
    for i in range(1, 31)
]


def test_curves_hold_the_history():
    figure = plot_training_curves(HISTORY, chance_loss=math.log(256))
    loss, scale, speed = figure.axes
    raw, smooth, level = loss.get_lines()
    assert raw.get_ydata().tolist() == [record["loss"] for record in HISTORY]
    assert set(level.get_ydata()) == {math.log(256)}
    assert scale.get_lines()[0].get_ydata().tolist() == [record["logit_scale"] for record in HISTORY]
    assert speed.get_lines()[0].get_ydata().tolist() == [record["samples_per_second"] for record in HISTORY]
    assert np.abs(np.diff(smooth.get_ydata())).max() < np.abs(np.diff(raw.get_ydata())).max()


def test_smoothing_neither_bends_nor_lags():
    for losses in (np.full(60, 2.5), np.linspace(5, 1, 60)):
        figure = plot_training_curves([{**HISTORY[0], "loss": loss} for loss in losses])
        smooth = figure.axes[0].get_lines()[1].get_ydata()
        assert smooth[3:-3] == pytest.approx(losses[3:-3])


def test_one_step_and_none():
    assert len(plot_training_curves(HISTORY[:1]).axes) == 3
    with pytest.raises(ValueError, match="history: got no records"):
        plot_training_curves([])


def test_log_is_read_up_to_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(record) for record in HISTORY]
    path.write_text("\n".join([*lines[:5], lines[5][:20]]))
    assert read_log(path) == HISTORY[:5]
    path.write_text("\n".join([lines[0], "half", lines[1]]))
    with pytest.raises(ValueError, match="line 2 is 'half'"):
        read_log(path)
