"""The Inception and timm extractors on random weights, against torch-fidelity and literal loops."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from config import FeatureOptions
from evaluations import evaluate, extractors, inception, metrics, reference
from evaluations.extractors import open_extractor
from evaluations.inception import Inception
from runtime.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random Inception weights with sane activations, in a file named by its digest, without batch counters."""
    torch.manual_seed(0)
    network = inception.build()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(
        {name: value for name, value in network.state_dict().items() if "num_batches" not in name}, folder / "w.pth"
    )
    digest = hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest()
    return (folder / "w.pth").rename(folder / f"inception-{digest[:8]}.pth")


class Remembering:
    """An extractor that computes each batch once: a pass of the network takes a second."""

    def __init__(self, inner):
        self.inner, self.seen = inner, {}

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, images):
        key = (tuple(images.shape), images.numpy().tobytes())
        if key not in self.seen:
            self.seen[key] = self.inner(images)
        return self.seen[key]


@pytest.fixture(scope="module")
def extractor(weights):
    return Inception(weights)


def pictures(seed, count, size=64):
    return np.random.RandomState(seed).randint(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_inception_is_torch_fidelitys(extractor, weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    other = FeatureExtractorInceptionV3(
        "peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    ).eval()
    hooked = []
    other.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: hooked.append(output))
    images = torch.from_numpy(pictures(0, 3, 80))
    pool, logits = other(images.permute(0, 3, 1, 2))
    output = extractor(images)
    torch.testing.assert_close(output.pool, pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.pool @ extractor.head.T, logits, rtol=1e-5, atol=1e-5)
    assert output.spatial.shape == (3, 2023) and output.spatial.min() == 0  # after the activation
    for h, w, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (16, 16, 6), (5, 11, 3)):
        torch.testing.assert_close(output.spatial[:, (h * 17 + w) * 7 + c], hooked[0][:, c, h, w], rtol=1e-5, atol=1e-5)


def test_inception_ignores_autocast_and_keeps_no_graph(extractor):
    images = torch.from_numpy(pictures(0, 1))
    plain = extractor(images)
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = extractor(images)
    assert output.pool.dtype == torch.float32 and not output.pool.requires_grad
    assert torch.equal(output.pool, plain.pool) and torch.equal(output.spatial, plain.spatial)


def tensorflow_row(row: np.ndarray, side: int) -> np.ndarray:
    """One row of TensorFlow 1's bilinear resize, position by position, in float64."""
    out = np.zeros(side)
    for target in range(side):
        source = target * (len(row) / side)
        low = math.floor(source)
        high = min(low + 1, len(row) - 1)
        out[target] = row[low] + (row[high] - row[low]) * (source - low)
    return out


@pytest.mark.parametrize("size", [8, 64, 256, 299, 300, 512])
def test_resize_is_tensorflow_1s(size):
    image = np.random.RandomState(size).randint(0, 256, (size, size + 3)).astype(np.float64)
    expected = np.stack([tensorflow_row(row, 299) for row in image])
    expected = np.stack([tensorflow_row(column, 299) for column in expected.T]).T
    output = inception.resize(torch.from_numpy(image).float()[None, None], 299)[0, 0]
    assert np.abs(output.double().numpy() - expected).max() < 0.01  # of 255: float32 positions, as in TensorFlow
    assert output[0, 0] == image[0, 0]


def test_inception_refuses_grey_images_and_wrong_files(extractor, weights, tmp_path):
    with pytest.raises(UserError, match="3 channels, these have 1"):
        extractor(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    damaged = tmp_path / weights.name
    damaged.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged: its SHA-256"):
        Inception(damaged)
    with pytest.raises(UserError, match="no weights file"):
        Inception(tmp_path / "absent.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        Inception(tmp_path / "cut.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no weights of this network"):
        Inception(tmp_path / "other.pth")
    torch.save({"code": Runs(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="asks to run"):
        Inception(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()


class Runs:
    """Unpickled carelessly, this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).mkdir, (self.path,)


def test_without_file_or_network_one_line_says_where_to_get_it(monkeypatch, tmp_path):
    def offline(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as caught:
        open_extractor(FeatureOptions(features="inception"))
    for word in (inception.FILE, inception.URL, "--feature-weights", "no route to host", "--features pixels"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_download_lands_in_the_cache(monkeypatch, tmp_path, weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "FILE", weights.name)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: open(weights, "rb"))  # noqa: SIM115
    opened = open_extractor(FeatureOptions(features="inception"))
    assert opened.weights == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (tmp_path / "checkpoints" / weights.name).read_bytes() == weights.read_bytes()


def cheap_distance(a, b):
    """Stands in for `frechet`, which has tests of its own: eigenvalues of 2048 x 2048 take seconds."""
    return ((a.mean - b.mean).square().sum() + (a.covariance * b.covariance).sum()).item()


def test_adms_five_numbers_from_files(weights, extractor, tmp_path, monkeypatch):
    """The whole command with stored statistics, a compact reference of the same, and the numbers recomputed by hand."""
    extractor = Remembering(extractor)
    monkeypatch.setattr(extractors, "open_extractor", lambda *words, **more: extractor)
    np.savez(tmp_path / "samples.npz", arr_0=pictures(0, 4, 32), labels=[0, 0, 1, 1])
    features = extractor(torch.from_numpy(pictures(1, 4, 32)))
    stored = {}
    for suffix, x in (("", features.pool), ("_s", features.spatial)):
        x = x.double().numpy() * 1.5  # not what arr_0 gives: the stored ones must be used
        stored |= {f"mu{suffix}": x.mean(0).astype(np.float32), f"sigma{suffix}": np.cov(x, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=pictures(1, 4, 32), **stored)
    words = [
        "--samples",
        str(tmp_path / "samples.npz"),
        "--feature-weights",
        str(weights),
        "--out",
        str(tmp_path / "m.json"),
    ]
    monkeypatch.setattr(metrics, "frechet", cheap_distance)
    evaluate.main([*words, "--reference", str(tmp_path / "adm.npz")])
    result = json.loads((tmp_path / "m.json").read_text())
    values = result["metrics"]
    assert list(values) == ["fid", "sfid", "is", "precision", "recall"]
    assert result["reference"]["statistics"] == "stored" and result["precision_recall"]["mode"] == "adm_fp16"
    assert result["features"]["weights_sha256"] == extractor.weights
    assert "not the published network" in result["warnings"][0]
    assert any("sorted by class" in warning for warning in result["warnings"])

    features = extractor(torch.from_numpy(pictures(0, 4, 32)))
    for name, x, suffix in (("fid", features.pool, ""), ("sfid", features.spatial, "_s")):
        x = x.double().numpy()
        own, other = (
            [torch.from_numpy(part.astype(float)) for part in pair]
            for pair in ((x.mean(0), np.cov(x, rowvar=False)), (stored[f"mu{suffix}"], stored[f"sigma{suffix}"]))
        )
        assert values[name] == pytest.approx(
            cheap_distance(metrics.Statistics(*own), metrics.Statistics(*other)), rel=1e-9
        )
    p = (features.pool @ extractor.head.T).double().softmax(1).numpy()
    assert values["is"] == pytest.approx(math.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()), rel=1e-5)

    compact = tmp_path / "compact.npz"
    reference.main(["--images", str(tmp_path / "adm.npz"), "--feature-weights", str(weights), "--out", str(compact)])
    evaluate.main([*words, "--reference", str(compact), "--shuffle", "3"])
    again = json.loads((tmp_path / "m.json").read_text())
    assert again["metrics"] == pytest.approx(values, rel=1e-9)  # one chunk: its order does not matter
    assert again["order"] == "shuffled by seed 3" and not any("sorted" in warning for warning in again["warnings"])

    np.savez(tmp_path / "bare.npz", mu=stored["mu"], sigma=stored["sigma"])
    evaluate.main([*words, "--reference", str(tmp_path / "bare.npz")])
    bare = json.loads((tmp_path / "m.json").read_text())
    assert list(bare["metrics"]) == ["fid", "is"] and bare["reference"]["num_images"] == 0
    reference.main(["--images", str(tmp_path / "bare.npz"), "--out", str(compact)])
    evaluate.main([*words, "--reference", str(compact)])
    assert json.loads((tmp_path / "m.json").read_text())["metrics"] == bare["metrics"]
    del stored["sigma_s"]
    np.savez(tmp_path / "adm.npz", arr_0=pictures(1, 4, 32), **stored)
    with pytest.raises(UserError, match="holds mu_s but not"):
        evaluate.main([*words, "--reference", str(tmp_path / "adm.npz")])


def test_a_reference_made_with_other_weights_is_refused(weights, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=pictures(0, 4, 16))
    reference.main(
        ["--images", str(tmp_path / "x.npz"), "--feature-weights", str(weights), "--out", str(tmp_path / "r.npz")]
    )
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"fc.bias": state["fc.bias"] + 1}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="made with other inception weights"):
        evaluate.main(
            [
                "--samples",
                str(tmp_path / "x.npz"),
                "--reference",
                str(tmp_path / "r.npz"),
                "--feature-weights",
                str(tmp_path / "w.pth"),
            ]
        )


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)  # with its classifier, as published files have
    path = tmp_path_factory.mktemp("timm") / "vit.pth"
    torch.save(model.state_dict(), path)
    return model.eval(), path


def test_timm_features_are_those_of_the_model(vit):
    model, path = vit
    extractor = open_extractor(FeatureOptions(features="timm:test_vit", feature_weights=str(path)))
    side = model.pretrained_cfg["input_size"][1]
    images = torch.from_numpy(pictures(0, 2, side))
    cfg = model.pretrained_cfg
    x = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(cfg["mean"])[:, None, None]) / torch.tensor(cfg["std"])[
        :, None, None
    ]
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(extractor(images).pool, expected, rtol=1e-4, atol=1e-5)
    assert len(extractor.weights) == 64 and extractor.name == "timm:test_vit"


def test_timm_size_safetensors_and_grey_images(vit, tmp_path):
    from safetensors.torch import save_file

    _model, path = vit
    save_file(torch.load(path, weights_only=True), tmp_path / "vit.safetensors")
    extractor = open_extractor(
        FeatureOptions(features="timm:test_vit@64", feature_weights=str(tmp_path / "vit.safetensors"))
    )
    colour = extractor(torch.from_numpy(pictures(0, 2, 32))).pool
    usual = open_extractor(FeatureOptions(features="timm:test_vit", feature_weights=str(path)))(
        torch.from_numpy(pictures(0, 2, 32))
    ).pool
    assert colour.shape == usual.shape and not torch.allclose(colour, usual, atol=1e-3)
    grey = torch.from_numpy(pictures(0, 2, 32)[..., :1])
    torch.testing.assert_close(extractor(grey).pool, extractor(grey.expand(-1, -1, -1, 3)).pool)


def test_timm_metrics_end_to_end(vit, tmp_path):
    _, path = vit
    np.savez(tmp_path / "a.npz", arr_0=pictures(0, 6, 16))
    np.savez(tmp_path / "b.npz", arr_0=pictures(1, 6, 16))
    evaluate.main(
        [
            "--samples",
            str(tmp_path / "a.npz"),
            "--reference",
            str(tmp_path / "b.npz"),
            "--features",
            "timm:test_vit@32",
            "--feature-weights",
            str(path),
            "--out",
            str(tmp_path / "m.json"),
        ]
    )
    result = json.loads((tmp_path / "m.json").read_text())
    assert list(result["metrics"]) == ["fd", "precision", "recall"] and result["features"]["name"] == "timm:test_vit@32"


def test_timm_refusals(vit, tmp_path, monkeypatch):
    _model, path = vit
    with pytest.raises(UserError, match="did you mean test_vit"):
        open_extractor(FeatureOptions(features="timm:tests_vit", feature_weights=str(path)))
    with pytest.raises(UserError, match="big is not a size"):
        open_extractor(FeatureOptions(features="timm:test_vit@big", feature_weights=str(path)))
    with pytest.raises(UserError, match="no weights file"):
        open_extractor(FeatureOptions(features="timm:test_vit", feature_weights=str(tmp_path / "absent.pth")))
    torch.save({"cls_token": torch.zeros(1, 1, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no weights of timm's test_vit"):
        open_extractor(FeatureOptions(features="timm:test_vit", feature_weights=str(tmp_path / "other.pth")))
    with pytest.raises(UserError, match="--feature-weights: --features pixels has no weights"):
        open_extractor(FeatureOptions(features="pixels", feature_weights=str(path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither in the cache nor within reach.*--feature-weights FILE"):
        open_extractor(FeatureOptions(features="timm:test_vit"))


def test_a_copy_under_another_name_is_the_same_weights(weights, tmp_path):
    shutil.copy(weights, tmp_path / "renamed.pth")
    assert Inception(tmp_path / "renamed.pth").weights.startswith(weights.stem[-8:])
