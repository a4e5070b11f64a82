"""What a person asks of a trained model and of the data: `predict`, `show`, and the tutorial's report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import assert_one_line_error, epoch_record, mnist_dist, run_result

from mnist_dist.commands import reproduce
from mnist_dist.data import load, scale
from mnist_dist.data.picture import prepare, read_picture
from mnist_dist.record.result import read_result, write_result
from mnist_dist.training.results import load_model


@pytest.fixture(scope="module")
def trained(small_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = mnist_dist("train", "--data-dir", small_dir, "--epochs", 20, "--lr", "1e-2", "--batch-size", 50, "--wandb",
                      "disabled", "--output-dir", "run", cwd=folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def files(small_dir, folder, number=3):
    """Test images as PNG files of 28 x 28; what the model sees of each."""
    test = load("mnist", str(small_dir)).test
    for i in range(number):
        Image.fromarray(test.images[i, 0].numpy()).save(folder / f"{i}.png")
    return [prepare(read_picture(folder / f"{i}.png")[0]).image_1HW for i in range(number)]


def test_a_line_of_json_for_each_picture(trained, small_dir, tmp_path):
    model, images = load_model(trained), files(small_dir, tmp_path)
    done = mnist_dist("predict", trained, "0.png", "1.png", "2.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in lines] == ["0.png", "1.png", "2.png"]
    for line, image in zip(lines, images, strict=True):
        expected = model.probabilities(scale(image.unsqueeze(0)))[0].tolist()
        assert line["probabilities"] == pytest.approx(expected, abs=1e-6) and list(line) == [
            "file", "digit", "probabilities", "notes"]
        assert line["digit"] == int(np.argmax(expected))
        assert any("unsure" in note for note in line["notes"]) == (max(expected) < 0.6)


@pytest.mark.parametrize("columns, shares", [(80, 10), (60, 0)])
def test_the_table_fits_the_terminal(columns, shares, trained, small_dir, tmp_path):
    model, images = load_model(trained), files(small_dir, tmp_path)
    done = mnist_dist("predict", trained, "0.png", "1.png", "2.png", cwd=tmp_path, COLUMNS=str(columns))
    head, *rows = done.stdout.splitlines()
    assert len(rows) == 3 and all(len(line) < columns for line in (head, *rows)), done.stdout
    for i, row in enumerate(rows):
        digit, sure, _, *percents, name = row.split()
        expected = model.probabilities(scale(images[i].unsqueeze(0)))[0].tolist()
        assert int(digit) == int(np.argmax(expected)) and float(sure) == pytest.approx(100 * max(expected), abs=0.06)
        assert list(map(float, percents)) == pytest.approx([100 * share for share in expected[:shares]], abs=0.51)
        assert name == f"{i}.png"


def test_a_bad_file_among_several_is_a_line_and_the_rest_is_predicted(trained, small_dir, tmp_path):
    files(small_dir, tmp_path)
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("L", (90, 60), 255).save(tmp_path / "blank.png")
    done = mnist_dist("predict", trained, "0.png", "bad.png", "none.png", "blank.png", "2.png", "--output", "seen.png",
                      cwd=tmp_path)
    assert done.returncode == 2 and [line.split()[-1] for line in done.stdout.splitlines()[1:-1]] == [
        "0.png", "blank.png", "2.png"]
    complaints = done.stderr.splitlines()
    for needle in ("error: bad.png cannot be read as an image", "error: none.png cannot be read",
                   "warning: blank.png: blank"):
        assert sum(needle in line for line in complaints) == 1, done.stderr
    with Image.open(tmp_path / "seen.png") as seen:
        assert seen.format == "PNG" and seen.height / seen.width == pytest.approx(3 * 2.2 / 8, rel=0.02)


def test_what_cannot_be_written_or_makes_no_sense_is_named(trained, small_dir, tmp_path):
    files(small_dir, tmp_path)
    done = mnist_dist("predict", trained, "0.png", "--output", "no/seen.png", cwd=tmp_path)
    assert done.returncode == 2 and "--output" in done.stderr and "cannot be written" in done.stderr
    assert_one_line_error(mnist_dist("predict", trained, "--json", cwd=tmp_path), "--json is of image files")


def test_the_grid_of_test_images(trained, small_dir, tmp_path):
    done = mnist_dist("predict", trained, "--data-dir", small_dir, "--output", "grid.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:3])
    labels, guesses = (line.split()[1:] for line in done.stdout.splitlines()[:2])
    assert len(labels) == 16 and sum(a == b for a, b in zip(labels, guesses, strict=True)) >= 12
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.format == "PNG" and min(grid.size) > 500
        assert grid.convert("RGB").getpixel((2, 2)) == (255, 255, 255), "white ground, in any viewer"


def test_a_folder_without_a_model_is_named(trained, tmp_path):
    assert_one_line_error(mnist_dist("predict", tmp_path, cwd=tmp_path), "has no model.safetensors")
    content = (trained / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert_one_line_error(mnist_dist("predict", tmp_path, cwd=tmp_path), "cannot be read")


def test_show_prints_the_tutorials_look(mnist_dir, tmp_path):
    done = mnist_dist("show", "--data-dir", mnist_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for needle in ("60,000 training and 10,000 test images", "[1, 28, 28]", "the first label is 5", "-0.7647", "0.9843",
                   "203,530 parameters", "[200, 1, 28, 28]", "[200, 10]", "near 0.1"):
        assert needle in done.stdout, needle
    assert [line[0] for line in done.stdout.splitlines() if line[:1].isdigit()] == ["1", "2", "3", "4"]
    assert all(len(line) <= 60 for line in done.stdout.splitlines() if line.startswith("  -")), "rows of pixels"
    assert {path.name for path in (tmp_path / "show").iterdir()} == {"digit.png", "digits.png"}


def fake_result(folder, protocol, dataset="mnist"):
    batch = 200 if "200" in protocol else 1
    epochs = [epoch_record(epoch=epoch, step=(epoch + 1) * 300, test_nll_sum=1234.5, test_accuracy=0.9,
                           epoch_seconds=0.5) for epoch in range(20 if batch == 200 else 1)]
    folder.mkdir(parents=True)
    (folder / "predictions.png").write_bytes(b"")
    write_result(folder, run_result(epochs, dataset, global_batch_size=batch, samples_per_second=100.0 * batch))


def test_the_report_sets_our_numbers_beside_the_tutorials(tmp_path, capsys):
    for protocol in reproduce.PROTOCOLS:
        fake_result(tmp_path / protocol.folder, protocol.folder)
    reproduce.reproduce({}, output_dir=str(tmp_path))
    report = (tmp_path / "report.md").read_text()
    assert report.strip() in capsys.readouterr().out
    assert "| 16 | 1234.5 | 1435.5 | 1440 ± 29 | 90.00 % | 0.50 | 5.28 |" in report
    assert "| 0 (cut at step 300) | 1234.5 | - | - |" in report, "what is not an epoch is not compared with one"
    assert "200 times as fast" in report and "in the tutorial 21 times" in report
    assert "not MNIST" not in report


@pytest.mark.parametrize(("step", "given", "wanted"), [
    ("compiled", {}, "on"), ("plain", {}, "off"), ("exact", {}, "off"), ("compiled", {"compile": "off"}, "off")])
def test_both_protocols_have_one_kind_of_step(step, given, wanted, tmp_path, monkeypatch):
    asked = []

    def run(protocol, folder, options):
        asked.append(options.get("compile"))
        fake_result(folder, protocol.folder)
        result = read_result(folder)
        return replace(result, environment=replace(result.environment, step=step))

    monkeypatch.setattr(reproduce, "run_protocol", run)
    reproduce.reproduce(given, output_dir=str(tmp_path))
    assert asked == [given.get("compile"), wanted]


def test_a_report_on_other_data_says_so(tmp_path):
    results = []
    for protocol in reproduce.PROTOCOLS:
        fake_result(tmp_path / protocol.folder, protocol.folder, dataset="synthetic")
        results.append(read_result(tmp_path / protocol.folder))
    text = "\n".join(reproduce.report_lines(results))
    assert "Trained on synthetic, not MNIST" in text
