"""Corruptions of images: what each computes, and corrupted sources that are the same whenever and wherever read."""

import colorsys
import dataclasses
import io
import pickle

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from tl_jax.core.card import Card
from tl_jax.data import duplicates, groups, sources
from tl_jax.data.image.corruptions import CORRUPTIONS, corrupt
from tl_jax.data.pipeline import View, eval_batches, train_batches
from tl_jax.data.readers import pack

CARD = Card("m", 10, input_size=12, crop=0.75)
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise")
SIZES = pytest.mark.parametrize("size", [(32, 29), (70, 81)], ids=["small", "large"])


def picture(height=32, width=32, seed=0):
    """Smooth colours with edges, a black and a white corner."""
    rng = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (2, 2, 0))
    image = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
    image[:4, :4], image[-4:, -4:] = 0, 255
    return image


def change(name, severity, image, seed=0):
    found = corrupt(image, name, severity, np.random.default_rng(seed))
    assert found.dtype == np.uint8 and found.shape == image.shape
    return found


def constant(name, severity, image):
    return CORRUPTIONS[name][1 if min(image.shape[:2]) <= 64 else 2][severity - 1]


# What each computes


@SIZES
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_an_image_more(name, size):
    image = picture(*size)
    changes = [np.abs(change(name, s, image).astype(float) - image).mean() for s in range(1, 6)]
    if name == "defocus_blur" and min(size) <= 64:  # the paper's first disks are one pixel, blurred more and more
        changes = changes[:3]
    assert all(a < b for a, b in zip([0, *changes], changes, strict=False)) or (name == "pixelate" and min(size) <= 64)
    assert 0 < changes[0] < changes[-1]


def test_the_constants_are_the_papers():
    """Of make_cifar_c.py and make_imagenet_c.py; sums, to be read against the files again."""
    expected = {
        "gaussian_noise": (0.37, 1.02), "shot_noise": (975, 105), "impulse_noise": (0.18, 0.62),
        "gaussian_blur": (3.5, 16), "defocus_blur": (5.5, 33.1), "contrast": (2.1, 1.05), "brightness": (0.8, 1.5),
        "jpeg": (293, 75), "pixelate": (4.1, 2.05),
    }  # fmt: skip
    found = {name: tuple(float(np.sum(table)) for table in tables) for name, (_, *tables) in CORRUPTIONS.items()}
    assert found == {name: pytest.approx(sums) for name, sums in expected.items()}


@SIZES
def test_gaussian_noise_has_its_deviation_and_no_mean(size):
    grey = np.full((*size, 3), 128, np.uint8)
    for severity in (1, 3):
        noise = change("gaussian_noise", severity, grey) / 255 - 128 / 255
        deviation = constant("gaussian_noise", severity, grey)
        assert abs(noise.mean()) < 4 * deviation / np.sqrt(noise.size)
        assert noise.std() == pytest.approx(deviation, rel=0.04)


def test_shot_noise_has_the_variance_of_photons():
    for level in (40, 160):
        grey = np.full((60, 60, 3), level, np.uint8)
        noisy, x = change("shot_noise", 3, grey) / 255, level / 255
        assert noisy.mean() == pytest.approx(x, rel=0.02)
        assert noisy.var() == pytest.approx(x / 100, rel=0.06)


def test_impulse_noise_makes_its_share_black_and_white():
    grey = np.full((64, 64, 3), 99, np.uint8)
    noisy = change("impulse_noise", 5, grey)
    shares = [(noisy == level).mean() for level in (0, 255, 99)]
    assert set(np.unique(noisy)) == {0, 99, 255} and shares == pytest.approx([0.035, 0.035, 0.93], abs=0.006)


@SIZES
def test_gaussian_blur_is_scipys(size):
    image = picture(*size)
    for severity in range(1, 6):
        deviation = constant("gaussian_blur", severity, image)
        expected = scipy.ndimage.gaussian_filter(image / 255, (deviation, deviation, 0), mode="nearest", truncate=4)
        assert np.abs(change("gaussian_blur", severity, image) - 255 * expected).max() <= 0.5 + 1e-9


@SIZES
def test_defocus_blur_is_the_papers_disk(size):
    """OpenCV's steps in scipy: a disk of equal weights, a 3 x 3 or 5 x 5 normal filter on it, mirrored borders."""
    image = picture(*size)
    for severity in range(1, 6):
        radius, deviation = constant("defocus_blur", severity, image)
        side = np.arange(-8, 9) if radius <= 8 else np.arange(-radius, radius + 1)
        disk = np.array([[1.0 if i * i + j * j <= radius**2 else 0.0 for i in side] for j in side])
        reach = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
        bell = np.exp(-(reach**2) / (2 * deviation**2))
        bell = np.outer(bell, bell) / bell.sum() ** 2
        kernel = scipy.ndimage.correlate(disk / disk.sum(), bell, mode="mirror")
        expected = np.stack([scipy.ndimage.correlate(image[..., c] / 255, kernel, mode="mirror") for c in range(3)], -1)
        assert np.abs(change("defocus_blur", severity, image) - 255 * np.clip(expected, 0, 1)).max() <= 0.5 + 1e-9


def test_contrast_draws_each_channel_to_its_mean():
    image = picture()
    for severity in range(1, 6):
        mean = image.mean(axis=(0, 1))
        expected = np.clip((image - mean) * constant("contrast", severity, image) + mean, 0, 255)
        assert np.abs(change("contrast", severity, image) - expected).max() <= 0.5 + 1e-9


def test_brightness_adds_to_the_value_of_hsv():
    image = picture()
    for severity in (1, 5):
        found = change("brightness", severity, image)
        for i, j in ((0, 0), (31, 31), (10, 20), (25, 3)):
            h, s, v = colorsys.rgb_to_hsv(*(image[i, j] / 255))
            expected = colorsys.hsv_to_rgb(h, s, min(v + constant("brightness", severity, image), 1))
            assert np.abs(found[i, j] - 255 * np.array(expected)).max() <= 0.5 + 1e-9


def test_jpeg_and_pixelate_are_pillows():
    image = picture(50, 41)
    for severity in range(1, 6):
        stream, pil = io.BytesIO(), Image.fromarray(image)
        pil.save(stream, "JPEG", quality=constant("jpeg", severity, image))
        np.testing.assert_array_equal(change("jpeg", severity, image), np.asarray(Image.open(stream)))
        share = constant("pixelate", severity, image)
        small = pil.resize((int(41 * share), int(50 * share)), Image.Resampling.BOX)
        expected = np.asarray(small.resize((41, 50), Image.Resampling.BOX))
        np.testing.assert_array_equal(change("pixelate", severity, image), expected)


def test_images_of_one_pixel_and_larger_ones_than_the_papers_are_corrupted_too():
    for name in CORRUPTIONS:
        assert change(name, 5, np.full((1, 3, 3), 200, np.uint8)).shape == (1, 3, 3)
    assert corrupt(picture(300, 610), "contrast", 1, np.random.default_rng(0)).shape == (256, 520, 3)


# Corrupted sources


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of three JPEGs each, 40 x 48, and a fourth PNG in the second."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(7):
        path = root / "train" / ("ant" if i < 3 else "bee") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(40, 48, i)).save(path, "PNG" if i == 6 else "JPEG")
    return f"folder:{root}"


def pixels(source):
    return [np.asarray(source.inputs[i]) for i in range(len(source))]


def test_a_corrupted_source_has_the_examples_of_the_clean_one(photos):
    clean, noisy = sources.load(photos), sources.load(f"corrupt:gaussian_noise:3:{photos}")
    assert (noisy.ids, noisy.class_names, noisy.domain_names) == (clean.ids, clean.class_names, (noisy.name[:-6],))
    np.testing.assert_array_equal(noisy.labels, clean.labels)
    assert noisy.fingerprint != clean.fingerprint and noisy.name == f"corrupt:gaussian_noise:3:{photos} train"
    for slice_ in ("train[:50%]", "train[50%:]"):
        assert sources.load(photos, slice_).ids == sources.load(f"corrupt:contrast:1:{photos}", slice_).ids


@pytest.mark.parametrize("name", RANDOM)
def test_the_pixels_depend_on_the_id_alone(photos, name):
    whole = sources.load(f"corrupt:{name}:2:{photos}")
    expected = dict(zip(whole.ids, pixels(whole), strict=True))
    part = pickle.loads(pickle.dumps(sources.load(f"corrupt:{name}:2:{photos}", "train[60%:]")))
    part = part.select(np.arange(len(part))[::-1])
    for i, image in zip(part.ids, pixels(part), strict=True):
        np.testing.assert_array_equal(image, expected[i])
    grey = np.full((2, 30, 30, 3), 99, np.uint8)
    two = dataclasses.replace(whole.select(np.arange(2)), inputs=whole.inputs.select(np.arange(2))._replace(clean=grey))
    assert (two.inputs[0] != two.inputs[1]).any()


def test_epochs_workers_and_domains_see_the_same_pixels(photos):
    names = (photos, f"corrupt:impulse_noise:4:{photos}")
    both = sources.load(names)
    batches = train_batches(both, {"image": View(CARD)}, 4, 0)
    seen = {}
    for made in (batches.iterate(0, 12), batches.iterate(0, 12, num_workers=1)):
        for batch in made:
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                np.testing.assert_array_equal(image, seen.setdefault(index, image))
    assert len(seen) == 14
    scored = next(iter(eval_batches(sources.load(names[1]), {"image": View(CARD)}, 7)))
    for i in range(7):
        np.testing.assert_array_equal(scored["image"][i], seen[7 + i])


def test_fingerprints_tell_corruptions_severities_and_pixels_apart(photos):
    names = (*(f"corrupt:{x}:{photos}" for x in ("contrast:1", "contrast:2", "jpeg:1")), "corrupt:contrast:1:digits")
    prints = [sources.load(name).fingerprint for name in (*names, f"corrupt:jpeg:2:corrupt:contrast:1:{photos}")]
    assert len(set(prints)) == 5 and prints[0] == sources.load(names[0]).fingerprint
    digits = sources.load("corrupt:contrast:1:digits")
    clean = digits.inputs.clean.copy()
    clean[5, 3, 3] ^= 1
    assert dataclasses.replace(digits, inputs=digits.inputs._replace(clean=clean)).fingerprint != prints[3]


def test_corrupted_arrays_and_encoded_images_and_packed_ones_are_read(photos, tmp_path):
    digits = sources.load("digits", "train[:7]")
    found = pixels(sources.load("corrupt:brightness:5:digits", "train[:7]"))
    for image, clean in zip(found, digits.inputs, strict=True):
        assert np.abs(image - np.minimum(clean + 0.3 * 255, 255)).max() <= 0.5 + 1e-9
    pack.pack(photos, str(tmp_path), report=lambda text: None)
    one, other = (sources.load(f"corrupt:jpeg:3:{name}") for name in (photos, f"packed:{tmp_path}"))
    assert one.ids == other.ids
    for a, b in zip(pixels(one), pixels(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_corrupted_copy_is_the_same_example_where_overlap_and_duplicates_are_told(photos):
    clean, noisy = sources.load(photos), sources.load(f"corrupt:gaussian_noise:1:corrupt:jpeg:5:{photos}", "train[:3]")
    assert sources.overlap(clean, noisy) == tuple(i for i in clean.ids if i in noisy.ids)
    assert len(sources.overlap(noisy, sources.load((photos, f"corrupt:contrast:1:{photos}")))) == 3
    assert not sources.overlap(
        sources.load(photos, "train[:50%]"), sources.load(f"corrupt:jpeg:1:{photos}", "train[50%:]")
    )
    found = duplicates.find({"train": clean, "target": noisy}, ["train", "target"])
    assert found["compared"]["exact"] == 7 and not sum(found["within"].values())
    names = (photos, (f"corrupt:jpeg:1:{photos}", f"corrupt:jpeg:2:{photos}"))
    a, b = (sources.load(name, group=r"/(\w+)/\d") for name in names)
    assert groups.shared(a, b) == [f"{photos}: ant", f"{photos}: bee"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corrupt:gausian_noise:1:digits", r"NAME 'gausian_noise' .did you mean 'gaussian_noise'..; known: gauss"),
        ("corrupt:contrast:6:digits", r"SEVERITY '6'.*a severity from 1 to 5"),
        ("corrupt:contrast:digits", r"SEVERITY 'digits'; SOURCE ''. Expected corrupt:NAME:SEVERITY:SOURCE"),
        ("corrupt:contrast:1:table:diabetes", "holds rows of a table; only images are corrupted"),
        ("corrupt:contrast:1:digit", r"unknown source 'digit' .did you mean 'digits'"),
    ],
)  # fmt: skip
def test_what_is_no_corruption_is_said(name, message):
    with pytest.raises(ValueError, match=message):
        sources.load(name, task="regression" if "table" in name else "classification")


def test_unreadable_images_are_found_below_a_corruption(photos, tmp_path):
    for i, text in enumerate((b"junk", b"")):
        (tmp_path / "ant").mkdir(exist_ok=True)
        (tmp_path / "ant" / f"{i}.jpg").write_bytes(text)
    Image.fromarray(picture()).save(tmp_path / "ant/2.png")
    name = f"corrupt:contrast:1:folder:{tmp_path}"
    with pytest.raises(ValueError, match=r"(?s)2 of 3 files .*ant/0\.jpg.*ant/1\.jpg"):
        sources.load(name)
    assert sources.load(name, on_error="skip").ids == ("ant/2.png",)
