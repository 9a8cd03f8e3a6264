"""Libraries around timm take our names, and folders we wrote, and train with them."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import guide
from support.networks import shake
from torch import nn

from ema_timm.attention import EmaAttn
from ema_timm.checkpoints.folder import CheckpointWriter
from ema_timm.integrations.detection import load_backbone_weights

NAME = "resnet18_ema"
# These libraries warn about their own parts.
pytestmark = pytest.mark.filterwarnings("ignore")


def need(module: str, extra: str = "friends"):
    return pytest.importorskip(module, reason=f"not run: pip install 'ema-timm[{extra}]'")


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 0])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as it is published, and its network."""
    model = shake(timm.create_model(NAME, num_classes=3)).eval()
    folder = CheckpointWriter(tmp_path_factory.mktemp("published") / "run")
    folder.make()
    data = timm.data.resolve_data_config({"img_size": 64}, model=model)
    folder.save_model(model, {}, data, ["cat", "dog", "emu"])
    return folder.path, model


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(shake(timm.create_model("resnet18")).state_dict(), file)
    return file


def ema_layers(model: nn.Module) -> list[EmaAttn]:
    return [m for m in model.modules() if isinstance(m, EmaAttn)]


def assert_trained(model: nn.Module, before: dict) -> None:
    """Every EMA layer has finite parameters, and not those of the start."""
    for name, module in model.named_modules():
        if isinstance(module, EmaAttn):
            assert module.gn.bias.isfinite().all()
            assert not torch.equal(module.gn.bias, before[f"{name}.gn.bias"])


def start(model: nn.Module) -> dict:
    """A copy of the state; zero-initialised norms, which keep EMA from learning, set to one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return {k: v.clone() for k, v in model.state_dict().items()}


class TestTransformers:
    def test_classifier_by_name_and_from_a_folder(self, published, images):
        from transformers import AutoModelForImageClassification, TimmWrapperConfig

        config = TimmWrapperConfig(architecture=NAME, num_labels=3)
        by_name = AutoModelForImageClassification.from_config(config)
        assert len(ema_layers(by_name)) == 8
        folder, model = published
        other = AutoModelForImageClassification.from_pretrained(
            folder, num_labels=4, ignore_mismatched_sizes=True
        ).eval()
        with torch.no_grad():
            assert other(images[0]).logits.shape == (4, 4)
            same = other.timm_model.forward_features(images[0])
            torch.testing.assert_close(same, model.forward_features(images[0]))

    def test_image_processor_and_pipeline(self, published, images):
        from PIL import Image
        from transformers import pipeline

        folder, model = published
        image = Image.new("RGB", (80, 64), (200, 30, 90))
        transform = timm.data.create_transform(
            **timm.data.resolve_data_config({"img_size": 64}, model=model)
        )
        with torch.no_grad():
            expected = model(transform(image)[None]).softmax(1)[0]
        classify = pipeline("image-classification", model=str(folder), device="cpu")
        found = {row["label"]: row["score"] for row in classify(image, top_k=3)}
        assert found == pytest.approx(
            dict(zip(["cat", "dog", "emu"], expected.tolist(), strict=True)), abs=1e-4
        )

    def test_trainer(self, published, images, tmp_path):
        need("accelerate")
        from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

        model = AutoModelForImageClassification.from_pretrained(published[0])
        before = start(model)
        rows = [{"pixel_values": x, "labels": y} for x, y in zip(images[0], images[1], strict=True)]
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            save_steps=2,
            logging_steps=1,
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        assert trainer.train().training_loss > 0
        assert_trained(model, before)
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "checkpoint-2")
        with torch.no_grad():
            torch.testing.assert_close(
                again.eval()(images[0]).logits, model.eval()(images[0]).logits
            )

    @pytest.mark.parametrize("how", ["name", "folder"])
    def test_backbone(self, published, images, how):
        from transformers import TimmBackbone, TimmBackboneConfig

        folder, model = published
        name = NAME if how == "name" else f"local-dir:{folder}"
        config = TimmBackboneConfig(
            backbone=name, out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
        )
        backbone = TimmBackbone(config).eval()
        if how == "folder":
            load_backbone_weights(backbone, name)
        with torch.no_grad():
            maps = backbone(images[0]).feature_maps
        assert [m.shape[1] for m in maps] == [64, 128, 256, 512]
        if how == "folder":
            with torch.no_grad():
                torch.testing.assert_close(maps[-1], model.forward_features(images[0]))

    @pytest.mark.parametrize("family", ["RTDetr", "RTDetrV2", "DFine"])
    def test_detector_trains_and_takes_backbone_weights(self, family, plain_weights, images):
        import transformers

        if not hasattr(transformers, f"{family}Config"):
            pytest.skip(f"transformers {transformers.__version__} has no {family}")
        sizes = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 32, "num_labels": 3}
        sizes |= {"decoder_ffn_dim": 32, "decoder_layers": 2, "encoder_layers": 1}
        sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 10}
        sizes |= {"encoder_in_channels": [128, 256, 512], "decoder_in_channels": [32, 32, 32]}
        backbone = transformers.TimmBackboneConfig(
            backbone=NAME, out_indices=[2, 3, 4], use_pretrained_backbone=False
        )
        config = getattr(transformers, f"{family}Config")(backbone_config=backbone, **sizes)
        model = getattr(transformers, f"{family}ForObjectDetection")(config)
        fresh = {k: v.clone() for k, v in model.state_dict().items()}
        (place,) = load_backbone_weights(model, NAME, weights=plain_weights)
        net = model.get_submodule(place)
        assert len(ema_layers(net)) == 8
        plain = timm.create_model(
            "resnet18", features_only=True, pretrained=True,
            pretrained_cfg_overlay={"file": str(plain_weights)},
        )  # fmt: skip
        with torch.no_grad():
            ours, theirs = net.eval()(images[0]), plain.eval()(images[0])[-3:]
        for a, b in zip(ours[-3:], theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for key, value in model.state_dict().items():
            assert key.startswith(place) or torch.equal(value, fresh[key])
        labels = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
        before = {k: v.clone() for k, v in net.state_dict().items()}
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(images[0][:2], labels=[labels, labels]).loss.backward()
        optimizer.step()
        assert_trained(net, before)


class TestDetectionWeights:
    def test_torchvision_faster_rcnn(self, plain_weights, images):
        detection = need("torchvision.models.detection")
        from torchvision.ops import FeaturePyramidNetwork

        class Backbone(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = timm.create_model(NAME, features_only=True, out_indices=(2, 3, 4))
                self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
                self.out_channels = 32

            def forward(self, x):
                return self.fpn({str(i): f for i, f in enumerate(self.body(x))})

        sizes = detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
        pool = detection.faster_rcnn.MultiScaleRoIAlign(["0", "1", "2"], 3, 1)
        model = detection.FasterRCNN(
            Backbone(), min_size=64, max_size=64, rpn_anchor_generator=sizes,
            box_roi_pool=pool, box_head=detection.faster_rcnn.TwoMLPHead(32 * 9, 32),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 3),
        )  # fmt: skip
        assert load_backbone_weights(model, NAME, weights=plain_weights) == ["backbone.body"]
        before = start(model)
        target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
        losses = model(list(images[0][:2]), [target, target])
        sum(losses.values()).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert_trained(model, before)
        assert set(model.eval()(list(images[0][:1]))[0]) == {"boxes", "labels", "scores"}

    @pytest.mark.parametrize("built_from", ["resnet18", "resnet26_ema"])
    def test_a_backbone_of_another_name_is_refused_untouched(self, plain_weights, built_from):
        model = nn.Sequential(timm.create_model(built_from, features_only=True))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="Sequential has none"):
            load_backbone_weights(model, NAME, weights=str(plain_weights))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_a_name_without_weights_is_refused(self):
        model = timm.create_model("cifar_resnet18_ema", features_only=True)
        with pytest.raises(RuntimeError, match="Give a file as weights="):
            load_backbone_weights(model, "cifar_resnet18_ema")


def test_segmentation_models(images, plain_weights):
    smp = need("segmentation_models_pytorch")
    model = smp.Unet(f"tu-{NAME}", encoder_weights=None, classes=2, decoder_channels=[16] * 5)
    assert load_backbone_weights(model, NAME, weights=plain_weights) == ["encoder.model"]
    before = start(model)
    out = model(images[0])
    assert out.shape == (4, 2, 64, 64)
    out.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_trained(model, before)


def classifier_of_timm(classes):
    pl = need("pytorch_lightning")

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model(NAME, num_classes=classes)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier()


def classifier_of_the_guide(classes):
    need("pytorch_lightning")
    return guide.run("Lightning")["Classifier"](classes)


@pytest.mark.parametrize("make", [classifier_of_timm, classifier_of_the_guide])
def test_lightning(make, images, tmp_path):
    pl = need("pytorch_lightning")
    model = make(3)
    before = start(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images), batch_size=4)
    pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(model, loader)  # fmt: skip
    assert_trained(model, before)


def test_fastai(images):
    need("fastai.callback.progress")
    from fastai.data.core import DataLoader, DataLoaders
    from fastai.learner import Learner

    rows = list(zip(images[0], images[1], strict=True))
    loader = DataLoader(rows, bs=4, num_workers=0)
    model = timm.create_model(NAME, num_classes=3)
    before = start(model)
    learner = Learner(
        DataLoaders(loader, loader, device="cpu"), model, loss_func=nn.CrossEntropyLoss(), lr=0.1
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    assert_trained(model, before)


def test_plugin_of_the_guide_builds_as_mmdetection_builds_it(images):
    bricks = need("mmcv.cnn.bricks")
    options = guide.run("mmdetection, mmsegmentation, mmpretrain")["plugins"][0]
    try:
        name, layer = bricks.build_plugin_layer(
            options["cfg"], in_channels=48, postfix="_after_conv3"
        )
    finally:
        need("mmengine.registry").MODELS.module_dict.pop("EmaPlugin")
    assert name.endswith("_after_conv3")
    assert (layer.channels, layer.groups) == (48, 24)
    assert layer(torch.randn(1, 48, 5, 5)).shape == (1, 48, 5, 5)


@pytest.mark.parametrize("name", [NAME, "seresnet18"])  # the second is the control
def test_lora_by_peft_on_all_convolutions(name, images):
    peft = need("peft")
    model = shake(timm.create_model(name, num_classes=3)).eval()
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=convs)).eval()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(convs)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(adapted(images[0]), images[1]).backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
    assert all(p.abs().sum() > 0 for n, p in trained.items() if "lora_B" in n)
    with torch.no_grad():
        want = adapted(images[0])
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(images[0]), want, rtol=1e-3, atol=1e-3)
    assert not any("lora" in n for n, _ in merged.named_parameters())
