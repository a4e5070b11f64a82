"""What a person asks of a trained model and of the data: `predict`, `show`, and the tutorial's report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import assert_one_line_error, epoch_record, mnist_dist, run_result

from mnist_dist.commands import reproduce
from mnist_dist.commands.predict import read_image
from mnist_dist.data import load, scale
from mnist_dist.errors import UserError
from mnist_dist.record.result import read_result, write_result
from mnist_dist.training.results import load_model


@pytest.fixture(scope="module")
def trained(small_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = mnist_dist("train", "--data-dir", small_dir, "--epochs", 20, "--lr", "1e-2", "--batch-size", 50, "--wandb",
                      "disabled", "--output-dir", "run", cwd=folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def digit():
    pixels = np.zeros((28, 28), np.uint8)
    pixels[6:22, 13:16] = 250
    return pixels


def test_an_image_of_28_pixels_is_taken_as_it_is(tmp_path):
    Image.fromarray(digit()).save(tmp_path / "d.png")
    image, inverted = read_image(tmp_path / "d.png")
    assert not inverted and np.array_equal(image[0].numpy(), digit())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_dark_on_light_is_inverted_and_other_sizes_fitted(mode, tmp_path):
    paper = Image.fromarray(255 - digit()).resize((90, 120))
    paper.convert(mode).save(tmp_path / "d.png")
    image, inverted = read_image(tmp_path / "d.png")
    assert inverted and image.shape == (1, 28, 28)
    assert image[0, 14, 14] > 200 and image[0, :, :3].max() < 30


def test_what_is_transparent_is_paper(tmp_path):
    ink = np.zeros((28, 28, 4), np.uint8)
    ink[..., 3] = digit()
    Image.fromarray(ink).save(tmp_path / "d.png")
    image, inverted = read_image(tmp_path / "d.png")
    assert inverted and image[0, 14, 14] > 200 and image[0, 0, 0] == 0


def test_no_image_is_named(tmp_path):
    (tmp_path / "d.png").write_text("no picture")
    for path in (tmp_path / "d.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(UserError, match="cannot be read as an image"):
            read_image(path)


def test_predictions_of_files_and_of_the_grid(trained, small_dir, tmp_path):
    model = load_model(trained)
    test = load("mnist", str(small_dir)).test
    for i in range(3):
        Image.fromarray(test.images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    done = mnist_dist("predict", trained, "0.png", "1.png", "2.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, *rows = done.stdout.splitlines()
    for i, row in enumerate(rows):
        words = row.split()
        probabilities = [float(word) for word in words[3:13]]
        image, inverted = read_image(tmp_path / f"{i}.png")  # half of these noisy images pass for dark on light
        assert ("inverted" in row) == inverted and f"{i}.png" in row
        expected = model.probabilities(scale(image.unsqueeze(0)))[0].tolist()
        assert probabilities == pytest.approx(expected, abs=1e-4) and sum(probabilities) == pytest.approx(1, abs=1e-3)
        assert int(words[0]) == int(np.argmax(expected))
    done = mnist_dist("predict", trained, "--data-dir", small_dir, "--output", "grid.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    reproduce.reproduce({}, quick=False, output_dir=str(tmp_path))
    report = (tmp_path / "report.md").read_text()
    assert report.strip() in capsys.readouterr().out
    assert "| 16 | 1234.5 | 1435.5 | 1440 ± 29 | 90.00 % | 0.50 | 5.28 |" in report
    assert "| 0 (cut at step 300) | 1234.5 | - | - |" in report, "what is not an epoch is not compared with one"
    assert "200 times as fast" in report and "in the tutorial 21 times" in report
    assert "not MNIST" not in report and "--quick" not in report


@pytest.mark.parametrize(("step", "given", "wanted"), [
    ("compiled", {}, "on"), ("plain", {}, "off"), ("exact", {}, "off"), ("compiled", {"compile": "off"}, "off")])
def test_both_protocols_have_one_kind_of_step(step, given, wanted, tmp_path, monkeypatch):
    asked = []

    def run(protocol, folder, options, quick):
        asked.append(options.get("compile"))
        fake_result(folder, protocol.folder)
        result = read_result(folder)
        return replace(result, environment=replace(result.environment, step=step))

    monkeypatch.setattr(reproduce, "run_protocol", run)
    reproduce.reproduce(given, quick=False, output_dir=str(tmp_path))
    assert asked == [given.get("compile"), wanted]


def test_a_report_on_other_data_says_so(tmp_path):
    results = []
    for protocol in reproduce.PROTOCOLS:
        fake_result(tmp_path / protocol.folder, protocol.folder, dataset="synthetic")
        results.append(read_result(tmp_path / protocol.folder))
    text = "\n".join(reproduce.report_lines(results, quick=True))
    assert "Trained on synthetic, not MNIST" in text and "Shortened by --quick" in text
