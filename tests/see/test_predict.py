"""Predictions are those of timm's inference script, and no image is passed over in silence."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.image_modes import in_mode
from support.odd_files import ODD_FILES
from support.runs import command as ema_timm_command
from support.runs import ema_timm
from timm.data import create_dataset, create_loader, resolve_data_config

from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.cli import main
from ema_timm.errors import UnreadableImageError, UserError
from ema_timm.export.description import class_labels
from ema_timm.figures import class_name, file_name, fitted
from ema_timm.measure.evaluation import evaluate
from ema_timm.measure.settings import EvaluateConfig
from ema_timm.see.classify import predict
from ema_timm.see.predictions import Prediction
from ema_timm.see.settings import PredictConfig
from ema_timm.see.sheet import save_sheet


def settings(source, *images, **options):
    options = {"device": "cpu", "workers": 0, **options}
    return PredictConfig(str(source), [str(each) for each in images], **options)


def documented(folder, images, batch_size=64):
    """What timm's inference.py computes, in the order of its files."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    dataset = create_dataset("", root=str(images))
    data = resolve_data_config({}, model=model, use_test_size=True)
    loader = create_loader(
        dataset, batch_size=batch_size, device=torch.device("cpu"), num_workers=0,
        persistent_workers=False, **data,
    )  # fmt: skip
    with torch.inference_mode():
        best = torch.cat([model(x).softmax(-1) for x, _ in loader]).topk(4)
    return dataset.filenames(absolute=True), best


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves its image files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("batch_size", [64, 5])
def test_equal_to_what_inference_py_computes(trained, digits, batch_size):
    files, best = documented(trained, digits / "val", batch_size)
    done = predict(settings(trained, digits / "val", batch_size=batch_size), progress=False)
    assert [row.filename for row in done.rows] == files
    assert [row.index for row in done.rows] == best.indices.tolist()
    assert [row.prob for row in done.rows] == best.values.tolist()
    assert done.rows[0].label == [f"digit_{i}" for i in done.rows[0].index]
    assert not done.unreadable


def test_forms_of_the_file_agree(trained, digits, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {}
    for suffix in ("csv", "jsonl", "parquet"):
        output = tmp_path / "new" / f"p.{suffix}"
        done = predict(settings(trained, digits / "val", topk=2, output=str(output)), False)
        rows[suffix] = [row._asdict() for row in done.rows]
    with (tmp_path / "new" / "p.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["filename", *(f"{n}_{i}" for n in ("index", "label", "prob")
                                            for i in (0, 1))]  # fmt: skip
    for row, want in zip(found, rows["csv"], strict=True):
        assert row["filename"] == want["filename"]
        assert [int(row["index_0"]), int(row["index_1"])] == want["index"]
        assert [float(row["prob_0"]), float(row["prob_1"])] == want["prob"]
    lines = (tmp_path / "new" / "p.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows["jsonl"]
    assert parquet.read_table(tmp_path / "new" / "p.parquet").to_pylist() == rows["parquet"]


def test_topk_is_at_most_the_classes(trained, digits):
    image = next((digits / "val").rglob("*.png"))
    assert len(predict(settings(trained, image, topk=50)).rows[0].label) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_reported_and_the_rest_predicted(
    trained, digits, tmp_path, workers, capsys
):
    folder = shutil.copytree(digits / "val", tmp_path / "images")
    whole = predict(settings(trained, folder, batch_size=4)).rows
    files = [row.filename for row in whole]
    with open(files[3], "rb+") as file:
        file.truncate(90)
    for bad in (*files[8:12], files[-1]):  # a whole batch of them too
        with open(bad, "wb") as file:
            file.write(b"no image")
    output = tmp_path / "p.jsonl"
    options = ["--workers", workers, "--batch-size", 4, "--device", "cpu"]
    command = ["predict", trained, folder, "--output", output, *options]
    assert main([str(part) for part in command]) == 1
    found = [Prediction(**json.loads(line)) for line in output.read_text().splitlines()]
    bad = {files[3], *files[8:12], files[-1]}
    assert [row.filename for row in found] == [name for name in files if name not in bad]
    assert found == [row for row in whole if row.filename not in bad]
    said = capsys.readouterr().err.splitlines()
    named = [line.removeprefix("cannot read ").partition(": ")[0] for line in said]
    assert sorted(named) == sorted(bad)


def test_files_are_taken_in_natural_order_and_as_given(trained, digits, tmp_path, capsys):
    image = next((digits / "val").rglob("*.png"))
    for name in ("10.png", "9.png", "notes.txt", "deep/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / name)
    command = ["predict", trained, image, tmp_path, tmp_path / "notes.txt", "--topk", 1]
    assert main([*map(str, command), "--device", "cpu"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    names = [image, *(tmp_path / n for n in ("9.png", "10.png", "deep/1.png", "notes.txt"))]
    assert [row[0] for row in rows] == [str(name) for name in names]
    assert len({row[1] for row in rows}) == 1
    label, probability = rows[0][1].split(" ")
    assert label.startswith("digit_")
    assert 0.25 < float(probability) <= 1


FILES = {"1": "png", "L": "png", "LA": "png", "P": "png", "PA": "tif", "RGB": "png", "RGBA": "png",
         "CMYK": "tif", "YCbCr": "tif", "LAB": "tif", "I;16": "png", "I;16B": "tif",
         "I": "pgm"}  # fmt: skip
"""Modes that Pillow finds in a file, and a file's suffix."""


@pytest.mark.parametrize("mode", FILES)
def test_predict_and_evaluate_see_the_same_pixels(trained, digits, tmp_path, mode):
    """Each image lies in the folder of the class that `predict` says: `evaluate` must agree."""
    for index, file in enumerate(sorted((digits / "val").rglob("*.png"))[::2]):
        with Image.open(file) as image:
            written = in_mode(image, mode)
        path = tmp_path / "all" / f"{index}.{FILES[mode]}"
        path.parent.mkdir(exist_ok=True)
        written.save(path, **({"compression": "raw"} if path.suffix == ".tif" else {}))
        with Image.open(path) as image:
            assert image.mode == mode
    rows = predict(settings(trained, tmp_path / "all"), progress=False).rows
    assert len({row.label[0] for row in rows}) > 2  # a white picture would be of one class
    for name in ("digit_0", "digit_1", "digit_2", "digit_3"):
        (tmp_path / "val" / name).mkdir(parents=True)
    for row in rows:
        shutil.move(row.filename, tmp_path / "val" / row.label[0])
    for folder in list((tmp_path / "val").iterdir()):
        if not any(folder.iterdir()):
            folder.rmdir()
    checkpoint = shutil.copytree(trained, tmp_path / "run")
    config = EvaluateConfig(str(checkpoint), data_dir=str(tmp_path), device="cpu", workers=0)
    assert evaluate(config, progress=False)["metrics"]["top1"] == 100


@pytest.mark.parametrize("mode", ["F", "I"])
def test_predict_refuses_the_images_that_evaluate_refuses(trained, tmp_path, mode):
    (tmp_path / "val" / "digit_0").mkdir(parents=True)
    file = tmp_path / "val" / "digit_0" / "x.tif"
    Image.new(mode, (8, 8)).save(file)
    (said,) = predict(settings(trained, file), progress=False).unreadable
    with pytest.raises(UnreadableImageError, match="pixels of 32 bits") as caught:
        evaluate(EvaluateConfig(str(trained), data_dir=str(tmp_path), device="cpu"), False)
    assert said == str(caught.value)


def test_a_folder_gives_the_formats_that_training_reads(trained, tmp_path):
    for suffix in ("png", "webp", "tif", "bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"x.{suffix}")
    assert len(predict(settings(trained, tmp_path), progress=False).rows) == 4


def test_onnx_file_predicts_as_its_network(trained, digits, tmp_path):
    pytest.importorskip("onnxruntime")
    from ema_timm.export import export

    folder = shutil.copytree(trained, tmp_path / "run")
    export(folder, "onnx", exporter="legacy")
    want = predict(settings(folder, digits / "val")).rows
    found = predict(settings(folder / "model.onnx", digits / "val")).rows
    for one, other in zip(found, want, strict=True):
        assert one[:3] == other[:3]
        assert one.prob == pytest.approx(other.prob, abs=1e-5)
    alone = tmp_path / "model.onnx"
    shutil.move(folder / "model.onnx", alone)
    for one, other in zip(predict(settings(alone, digits / "val")).rows, want, strict=True):
        assert one[:3] == other[:3]
    (folder / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.onnx cannot be run: .*Export it again"):
        predict(settings(folder / "model.onnx", digits / "val"))
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"there is no file.*ema-timm export"):
        predict(settings(folder / "model.onnx", digits / "val"))


def test_onnx_file_of_others_needs_the_folder(trained, digits, tmp_path):
    """Its metadata has no preprocessing and no class names."""
    onnx = pytest.importorskip("onnx")
    from ema_timm.export import export

    folder = shutil.copytree(trained, tmp_path / "run")
    model = onnx.load(export(folder, "onnx", exporter="legacy").path)
    described = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {"author": "someone"})
    onnx.save(model, folder / "other.onnx")
    assert predict(settings(folder / "other.onnx", digits / "val")).rows
    shutil.move(folder / "other.onnx", tmp_path)
    with pytest.raises(UserError, match=r"config\.json"):
        predict(settings(tmp_path / "other.onnx", digits / "val"))
    for key, value, said in [
        ("mean", "[0.5", "metadata of .* cannot be read"),
        ("mean", "null", "mean must be a list"),
        ("std", "[0, 0, 0]", "std must be numbers above 0"),
        ("label_names", '["a"]', "but 1 classes are named"),
    ]:
        onnx.helper.set_model_props(model, described | {key: value})
        onnx.save(model, tmp_path / "damaged.onnx")
        with pytest.raises(UserError, match=said):
            predict(settings(tmp_path / "damaged.onnx", digits / "val"))


def test_greyscale_network(digits, tmp_path):
    model = timm.create_model("test_resnet_ema", num_classes=2, in_chans=1)
    data = {**resolve_data_config(model=model), "input_size": (1, 32, 32)}
    data |= {"mean": (0.5,), "std": (0.5,)}
    CheckpointWriter(tmp_path).save_model(model, {"in_chans": 1}, data, ["a", "b"])
    done = predict(settings(tmp_path, digits / "val", sheet=str(tmp_path / "s.png")))
    assert len(done.rows) == 23
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 500


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"topk": 0}, "--topk must be at least 1, got 0"),
        ({"output": "p.xlsx"}, r"--output ends in \.csv, \.jsonl, \.parquet, got p\.xlsx"),
        ({"sheet": "s.pdf"}, r"--sheet is a \.png file"),
        ({"images": ["nowhere.png"]}, "there is no image or folder nowhere.png"),
        ({"source": "resnet51_ema"}, "there is no checkpoint folder resnet51_ema, and timm says"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_before_any_work(trained, digits, options, match):
    given = {"source": str(trained), "images": [str(digits / "val")], **options}
    with pytest.raises(UserError, match=match) as caught:
        predict(PredictConfig(**given, device="cpu"))
    assert "\n" not in str(caught.value)


def test_an_image_is_never_replaced_by_the_contact_sheet(trained, digits, tmp_path):
    image = next((digits / "val").rglob("*.png"))
    copy = Path(shutil.copy(image, tmp_path))
    with pytest.raises(UserError, match="is one of the images, which it would replace"):
        predict(settings(trained, tmp_path, sheet=str(copy)))
    assert copy.read_bytes() == image.read_bytes()


def test_a_folder_without_images(trained, tmp_path):
    with pytest.raises(UserError, match="there are no images in"):
        predict(settings(trained, tmp_path))


def test_parquet_names_its_extra(trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("ema_timm.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ema-timm\[parquet\]'"):
        predict(settings(trained, digits / "val", output=str(tmp_path / "p.parquet")))


def test_class_labels():
    assert class_labels(["a", "b"], 2) == ["a", "b"]
    assert class_labels(None, 1000)[3].startswith("tiger shark")
    assert class_labels(None, 3) == ["0", "1", "2"]


class TestSheet:
    def test_the_rest_of_many_images_is_counted(self, digits, tmp_path, monkeypatch):
        monkeypatch.setattr("ema_timm.see.sheet.MOST_IMAGES", 5)
        image = next((digits / "val").rglob("*.png"))
        row = Prediction(str(image), [0], ["a"], [0.9])
        assert save_sheet([row] * 12, 3, tmp_path / "s.png") == 7
        assert save_sheet([row], 3, tmp_path / "s.png") == 0

    def test_names_of_classes_fit_their_cells(self, digits, tmp_path, monkeypatch):
        """Of ImageNet's, drawn as wide as matplotlib says: no label runs into its neighbour."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawn = []
        save = Figure.savefig

        def keep(figure, *args, **options):
            drawn.append(figure)
            save(figure, *args, **options)

        monkeypatch.setattr(Figure, "savefig", keep)
        image = str(next((digits / "val").rglob("*.png")))
        labels = class_labels(None, 1000)[100:300:8]
        rows = [Prediction(image, [i], [label], [0.5]) for i, label in enumerate(labels)]
        save_sheet(rows, 3, tmp_path / "s.png")
        (figure,) = drawn
        renderer = FigureCanvasAgg(figure).get_renderer()
        texts = [t for t in figure.axes[0].texts if t.get_weight() == "bold"]
        assert len(texts) > len(labels)  # some take two lines
        inches = [t.get_window_extent(renderer).width / figure.dpi for t in texts]
        assert max(inches) < 1.45

    def test_lettering(self):
        assert fitted("a long name of a class", 10, 2) == "a long\nname of a…"
        assert fitted("", 5) == ""
        assert class_name("a $ b $", 3) == "a $ b $"
        assert class_name("猫", 3) == "class 3"
        assert file_name("猫.png") == "?.png"

    def test_names_that_the_font_cannot_draw(self, digits, tmp_path):
        image = shutil.copy(next((digits / "val").rglob("*.png")), tmp_path / "猫$a$.png")
        row = Prediction(str(image), [0], ["$x^$"], [0.9])
        save_sheet([row], 3, tmp_path / "s.png")  # warnings are errors


def test_hidden_files_are_skipped_and_reported(trained, digits, tmp_path, capsys):
    image = next((digits / "val").rglob("*.png"))
    for name in ("a.png", ".b.png", ".cache/c.png", "__MACOSX/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / name)
    assert main(["predict", str(trained), str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert [line.partition("\t")[0] for line in said.out.splitlines()] == [str(tmp_path / "a.png")]
    assert "3 hidden files and folders skipped (.b.png, .cache, __MACOSX)" in said.err
    hidden = str(tmp_path / ".b.png")
    assert main(["predict", str(trained), hidden, "--device", "cpu"]) == 0  # it was named
    assert capsys.readouterr().out.startswith(hidden)


@pytest.mark.parametrize("suffix", ["", "csv", "jsonl", "parquet"])
def test_names_that_are_no_text_lose_nothing(trained, digits, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    image, folder = next((digits / "val").rglob("*.png")), tmp_path / "caf\udce9"
    folder.mkdir()
    for name in ("a\udcff.png", "b.png", "c\nd\te\x1b[2J.png"):
        shutil.copy(image, folder / name)
    output = ["--output", tmp_path / f"p.{suffix}"] if suffix else []
    sheet = tmp_path / "sheet.png"
    done = ema_timm("predict", trained, folder, *output, "--sheet", sheet, "--device", "cpu",
                    PYTHONIOENCODING="utf-8:strict")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(sheet) as drawn:
        drawn.load()
    if not suffix:
        names = [line.partition("\t")[0] for line in done.stdout.splitlines()]
        assert [name.rpartition("/")[2] for name in names] == [
            r"a\udcff.png", "b.png", r"c\nd\te\x1b[2J.png",
        ]  # fmt: skip
        return
    if suffix == "csv":
        with output[1].open(newline="", encoding="utf-8") as file:
            names = [row["filename"] for row in csv.DictReader(file)]
    elif suffix == "jsonl":
        names = [json.loads(line)["filename"] for line in output[1].read_bytes().split(b"\n")[:-1]]
    else:
        import pyarrow.parquet

        names = pyarrow.parquet.read_table(output[1])["filename"].to_pylist()
    assert [name.rpartition("/")[2] for name in names] == [
        r"a\udcff.png", "b.png", "c\nd\te\x1b[2J.png",
    ]  # fmt: skip
    assert r"caf\udce9" in names[0]


@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("command", ["predict", "attend"])
def test_what_is_no_file_does_not_hang(trained, digits, tmp_path, make, command):
    shutil.copy(next((digits / "val").rglob("*.png")), tmp_path / "a.png")
    make(tmp_path / "x.png")
    done = subprocess.run(
        ema_timm_command(command, trained, tmp_path, "--device", "cpu"),
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == {"predict": 1, "attend": 2}[command]
    assert f"cannot read {tmp_path}/x.png: not a regular file" in done.stderr
    assert "Traceback" not in done.stderr
    if command == "predict":
        assert done.stdout.startswith(f"{tmp_path}/a.png\t")
