"""timm-cmt cost: the paper's formulas beside what is counted, and what lies between them."""

import numpy as np
import pytest
import timm
from common import count_kept, images
from PIL import Image
from test_cli import fail

from timm_cmt.cli import cost, main
from timm_cmt.cli.cost import block_formula, count_cost


def test_the_formula_is_the_paper_s():
    n, d, k = 3136, 64, 8
    lines = 10 * n * d**2 * (1 + 0.2 / k**2) + 2 * n**2 * d / k**2 + 45 * n * d
    assert block_formula(n, d, k) == pytest.approx(lines, rel=1e-12)


def test_what_is_counted_beyond_the_formula_is_what_the_output_names():
    # At 256 every k divides every map. Of CMT-S.
    costs = {row.part: row for row in count_cost("cmt_s", (256, 256))}
    widths, depths, reductions = (32, 64, 128, 256, 512), (3, 3, 16, 3), (8, 4, 2, 1)
    for i, (depth, k) in enumerate(zip(depths, reductions)):
        row, n, d = costs[f"stage {i + 1}"], (64 // 2**i) ** 2, widths[i + 1]
        reduction, aggregation = depth * n * d * (k > 1), 4 * widths[i] * d * n
        assert row.tokens == n and row.counted == row.formula + reduction + aggregation
    stem = 128**2 * 9 * (3 * 32 + 2 * 32 * 32)
    head = 8**2 * 512 * 1280 + 1280 * 1000
    assert costs["stem"].counted == stem and costs["head"].counted == head


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_the_parts_add_up_to_the_model(size):
    *parts, whole = count_cost("cmt_ti", size)
    model = timm.create_model("cmt_ti", img_size=size, device="meta")
    assert whole.parameters == sum(p.numel() for p in model.parameters())
    for field in ("counted", "parameters", "bias", "kept"):
        assert getattr(whole, field) == sum(getattr(part, field) for part in parts)
    assert whole.bias == sum(stage.rel_pos_bias.weight.numel() for stage in model.stages)


def test_what_is_kept_is_what_training_keeps_on_the_cpu():
    expected = count_kept(timm.create_model("cmt_ti", img_size=64), images(1, height=64, width=64))
    assert count_cost("cmt_ti", (64, 64))[-1].kept == pytest.approx(expected, rel=0.01)


def test_the_table_has_a_row_for_each_part_of_each_size(capsys):
    assert main(["cost", "cmt_ti", "--size", "64", "96x160"]) == 0
    out = capsys.readouterr().out
    assert "cmt_ti, 64 x 64 pixels" in out and "cmt_ti, 96 x 160 pixels" in out and "It leaves out" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("stem", "stage", "head", "all"))]
    assert [row[0] for row in rows] == ["stem", *["stage"] * 4, "head", "all"] * 2
    assert rows[1][2] == "256" and rows[8][2:4] == ["960", "0.044"]


def test_a_size_is_one_number_or_two(capsys):
    assert "64x64x64 is no image size for CMT" in fail(capsys, "cost", "--size", "64x64x64")
    assert "16 is no image size for CMT" in fail(capsys, "cost", "--size", "16x64")


def test_the_growth_is_drawn_with_its_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "PLOT_SIZES", range(224, 449, 224))
    path = tmp_path / "new" / "growth.png"
    assert main(["cost", "cmt_ti", "--size", "64", "--plot", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["growth.png"]
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] > 900 and (picture.min(axis=-1) < 200).any()


def test_a_picture_that_cannot_be_written_is_refused_before_counting(tmp_path, capsys):
    assert "is a folder" in fail(capsys, "cost", "cmt_ti", "--plot", str(tmp_path))
    assert "matplotlib writes no .txt" in fail(capsys, "cost", "cmt_ti", "--plot", str(tmp_path / "growth.txt"))
    assert not capsys.readouterr().out
