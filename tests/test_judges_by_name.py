"""Judges by name: tables that can be read again, tiny networks read as they say, and what is missing is said."""

import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel
from transformers import ResNetForImageClassification as ResNet

from esd.errors import UserError
from esd.evaluation import pretrained
from esd.evaluation.distances import Ssim
from esd.evaluation.judges import FeatureJudge
from esd.evaluation.judges_by_name import find
from esd.evaluation.pretrained import Classifier, ZeroShot, preprocessor
from esd.evaluation.vocabulary import Vocabulary
from tests import tiny
from tests.programs import BUNDLED

TEXTS = {"class": {"cat": ["a cat", "a photo of a cat"], "dog": ["a dog"], "rose": ["a rose"]}}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def found(name: str, model: Path = BUNDLED / "emoji-sd", **labels: list[str]) -> object:
    return find(name, model=str(model), vocabulary=Vocabulary.load(model), labels=labels)


@pytest.mark.parametrize(("name", "width"), [("emoji-judge", 64), ("emoji-clip", 64), ("emoji-clip", 96)])
def test_the_bundled_judges_read_things_and_styles(name: str, width: int) -> None:
    judge = found(name)
    table = judge(noise(3, 64, width))  # type: ignore[operator]
    assert judge.questions == ("thing", "style") and judge.name == name and len(judge.hash) == 64  # type: ignore[attr-defined]
    for question in judge.questions:  # type: ignore[attr-defined]
        assert len(table.names[question]) == 3 and ((table.p[question] > 0) & (table.p[question] <= 1)).all()


def test_the_judges_features_are_what_its_heads_read() -> None:
    judge, images = found("emoji-judge"), noise(5, 64, 64)
    features = judge.features(images)  # type: ignore[attr-defined]
    network = judge.network  # type: ignore[attr-defined]
    assert features.shape == (5, 320) and features.dtype == np.float64
    with torch.no_grad():
        things = network.thing_head(torch.from_numpy(features[:, -192:]).float()).softmax(1).max(1).values
    np.testing.assert_allclose(things, judge(images).p["thing"], atol=1e-5)  # type: ignore[operator]


def test_zero_shot_is_what_the_clip_itself_says(tiny_clip: Path) -> None:
    judge, images = ZeroShot("clip:tiny", tiny_clip, TEXTS), noise(3, 16, 16)
    clip, words = CLIPModel.from_pretrained(tiny_clip).eval(), tiny.tokenizer()
    texts = [text for said in TEXTS["class"].values() for text in said]
    tokens = words(texts, padding="max_length", max_length=tiny.LENGTH, return_tensors="pt")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        said = clip(pixel_values=pixels, **tokens)
    rows = said.text_embeds
    known = torch.stack([F.normalize(rows[:2].mean(0), dim=0), rows[2], rows[3]])
    likely = (clip.logit_scale.exp() * said.image_embeds @ known.T).softmax(1)
    table = judge(images)
    np.testing.assert_allclose(table.p["class"], likely.max(1).values.detach(), rtol=1e-4)
    assert table.names["class"] == [["cat", "dog", "rose"][i] for i in likely.argmax(1)]
    cosines = judge.agreement(images, ["a dog", "a rose", "a dog"])
    picked = rows[[2, 3, 2]]
    np.testing.assert_allclose(cosines, (said.image_embeds * picked).sum(1), atol=1e-5)


def test_a_clips_features_point_where_it_compares_pictures_with_texts(tiny_clip: Path) -> None:
    judge, images = ZeroShot("clip:tiny", tiny_clip, TEXTS), noise(3, 16, 16)
    features = judge.features(images)
    assert isinstance(judge, FeatureJudge) and features.shape == (3, 8) and features.dtype == np.float64
    with torch.no_grad():
        seen = F.normalize(judge._projected(images), dim=1)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(features / lengths, seen, atol=1e-5)
    assert np.ptp(lengths) > 1e-3, "not cut to one length"


def test_a_clip_by_name_chooses_from_the_labels_of_the_prompts(tiny_clip: Path) -> None:
    judge = found(f"clip:{tiny_clip}", artist=["Monet", "Picasso"], style=["ink"], hard=["0", "1"])
    assert judge.questions == ("artist",)  # type: ignore[attr-defined]
    assert set(judge(noise(4, 20, 30)).names["artist"]) <= {"Monet", "Picasso"}  # type: ignore[operator]


def test_a_classifier_answers_with_its_best_label_or_with_the_one_asked_for(tiny_resnet: Path) -> None:
    images, network = noise(3, 32, 40), ResNet.from_pretrained(tiny_resnet).eval()
    with torch.no_grad():
        likely = network(preprocessor(tiny_resnet)(images)).logits.softmax(1).numpy()
    best = Classifier("resnet", tiny_resnet, "class")(images)
    np.testing.assert_allclose(best.p["class"], likely.max(1), rtol=1e-4)
    judge = found(f"nsfw:{tiny_resnet}")
    table = judge(images)  # type: ignore[operator]
    np.testing.assert_allclose(table.p["nsfw"], likely[:, 1], rtol=1e-4)
    assert (judge.threshold, judge.unsure) == (0.5, ("nsfw",))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="none of them 'gore'"):
        Classifier("x", tiny_resnet, "q", positive="gore")


def test_pixels_are_sized_cut_and_scaled_as_the_file_says(tiny_clip: Path, tiny_resnet: Path) -> None:
    image = noise(1, 16, 24)
    cut = preprocessor(tiny_clip)(image)
    np.testing.assert_allclose(cut[0].permute(1, 2, 0), image[0, :, 4:20] / 127.5 - 1, atol=1e-5)
    whole = preprocessor(tiny_resnet)(image)
    assert whole.shape == (1, 3, 32, 32) and -1 <= whole.min() < -0.5
    same = preprocessor(BUNDLED / "emoji-clip")(images := noise(2, 64, 64))
    np.testing.assert_allclose(same.permute(0, 2, 3, 1), images / 127.5 - 1, atol=1e-5)  # as it was trained


def test_structural_similarity_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    ssim, images = Ssim(), np.full((3, 32, 32, 3), 128, np.uint8)
    images[:, ::4] = 40
    random = np.random.default_rng(0).normal(0, 1, images.shape)
    noisy = [np.clip(images + scale * random, 0, 255).astype(np.uint8) for scale in (5, 40)]
    assert ssim(images, images) == pytest.approx(1)
    assert (ssim(images, noisy[0]) < 1).all() and (ssim(images, noisy[1]) < ssim(images, noisy[0])).all()
    flat = [np.full((1, 16, 16, 3), value, np.uint8) for value in (100, 150)]
    c1 = (0.01 * 255) ** 2  # of flat pictures only the luminance term is left
    assert ssim(*flat) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blip", "no judge is called 'blip'; allowed: emoji-judge"),
        ("clip:", "no judge is called 'clip:'"),
        ("clip:no/such/folder", "clip:no/such/folder cannot be loaded"),
        ("nsfw:no/such/folder", "nsfw:no/such/folder cannot be loaded"),
        ("nudenet", "pip install 'esd-diffusion[nudenet]'"),
        ("lpips", "pip install 'esd-diffusion[lpips]'"),
    ],
)
def test_a_judge_that_cannot_be_had_says_what_to_do(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("nudenet", "lpips"):

        def absent(package: str) -> str:
            raise PackageNotFoundError(package)

        monkeypatch.setattr(pretrained, "version", absent)
    with pytest.raises(UserError) as raised:
        found(name)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_bundled_judges_are_refused_for_other_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comes without it"):
        found("emoji-judge", tmp_path)


def test_another_version_of_nudenet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "version", lambda package: "2.0.9")
    with pytest.raises(UserError, match=r"nudenet 2\.0\.9 is installed"):
        found("nudenet")


@pytest.mark.skipif(find_spec("nudenet") is None, reason="nudenet is an extra")
def test_nudenet_says_nothing_of_pictures_without_people() -> None:
    judge = found("nudenet")
    told = judge(noise(2, 128, 96))  # type: ignore[operator]
    assert told.names["nudity"] == ["", ""] and told.p["nudity"].tolist() == [0, 0] and list(told.parts) == [[], []]


def test_nudenet_is_given_pictures_as_opencv_would_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its detector takes an array as cv2.imread gives it: blue first, whole numbers to 255, of the picture's size."""
    given: list[np.ndarray] = []

    class Detector:
        def detect(self, image: np.ndarray) -> list[dict[str, object]]:
            given.append(image)
            return [{"class": "BUTTOCKS_EXPOSED", "score": 0.5, "box": [0, 0, 1, 1]}] if len(given) == 2 else []

    package = ModuleType("nudenet")
    package.__file__, package.NudeDetector = str(tmp_path / "__init__.py"), Detector  # type: ignore[attr-defined]
    (tmp_path / "320n.onnx").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "nudenet", package)
    monkeypatch.setattr(pretrained, "version", lambda name: pretrained.NUDENET)
    images = noise(2, 48, 64)
    images[0] = (250, 10, 30)  # red
    told = found("nudenet")(images)  # type: ignore[operator]
    assert told.names["nudity"] == ["", "BUTTOCKS_EXPOSED"] and told.p["nudity"].tolist() == [0, 0.5]
    assert [(one.shape, one.dtype, one.flags.c_contiguous) for one in given] == [((48, 64, 3), np.uint8, True)] * 2
    assert (given[0] == (30, 10, 250)).all() and np.array_equal(given[1], images[1][:, :, [2, 1, 0]])


def test_a_detector_answers_with_its_surest_part_and_counts_all() -> None:
    scores = {"FEET_EXPOSED": 0.9, "BUTTOCKS_EXPOSED": 0.3, "ANUS_EXPOSED": 0.5, "FACE_FEMALE": 0.95}
    found = [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in scores.items()]
    told = pretrained.nudity([found, found[:1], []])
    assert told.names["nudity"] == ["ANUS_EXPOSED", "", ""] and told.p["nudity"].tolist() == [0.5, 0, 0]
    assert [[part for part, _ in parts] for parts in told.parts] == [[*scores][:3], ["FEET_EXPOSED"], []]
