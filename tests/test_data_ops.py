"""Decoding, the card's resize and crop, and the augmentations, against torchvision, Pillow and plain numpy."""

import inspect
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from tl_jax.core import checks
from tl_jax.core.card import Card
from tl_jax.data.image import decode, ops
from tl_jax.data.image import rand_augment as ra
from tl_jax.data.image.augment import make_preprocess


def photo(height=60, width=83, seed=0):
    """A smooth random image, so that interpolation has something to interpolate."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, file_format, **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def transforms():
    """torchvision.transforms.functional; skips the test where torch or torchvision is not installed."""
    pytest.importorskip("torch_reference")  # lets torchvision be imported where its compiled operators are missing
    return pytest.importorskip("torchvision.transforms.functional")


def same_as_pil(ours, pil):
    np.testing.assert_array_equal(ours, np.asarray(pil))


# Decoding


def test_jpeg_and_png_decode_as_pillow_does():
    image = photo()
    data = encoded(Image.fromarray(image), "JPEG", quality=90)
    np.testing.assert_array_equal(decode.decode(data), np.asarray(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode.decode(encoded(Image.fromarray(image), "PNG")), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(orientation):
    image = photo(40, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(image), "PNG", exif=exif.tobytes())
    # Independent of Pillow's transposition: where the stored rows and columns belong, by the EXIF standard.
    upright = {
        1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1], 5: image.swapaxes(0, 1),
        6: np.rot90(image, -1), 7: image[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(image),
    }  # fmt: skip
    np.testing.assert_array_equal(decode.decode(data), upright[orientation])


def test_sixteen_bits_are_never_made_eight():
    grey = np.linspace(0, 65535, 24 * 31).reshape(24, 31).astype(np.uint16)
    with pytest.raises(decode.WrongForm, match="pixels are uint16, expected uint8"):
        decode.decode(encoded(Image.fromarray(grey), "PNG"))


def test_grey_bilevel_and_palette_become_rgb():
    image = photo()
    grey = Image.fromarray(image).convert("L")
    np.testing.assert_array_equal(decode.decode(encoded(grey, "PNG")), np.asarray(grey)[..., None].repeat(3, 2))
    bilevel = grey.convert("1")
    np.testing.assert_array_equal(
        decode.decode(encoded(bilevel, "PNG")), np.asarray(bilevel)[..., None].repeat(3, 2).astype(np.uint8) * 255
    )
    palette = Image.fromarray(image).quantize(16)
    colours = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    np.testing.assert_array_equal(decode.decode(encoded(palette, "PNG")), colours)


def test_transparent_pixels_are_laid_on_white():
    image = photo()
    alpha = np.random.default_rng(1).integers(0, 256, image.shape[:2], np.uint8)
    decoded = decode.decode(encoded(Image.fromarray(np.dstack([image, alpha])), "PNG"))
    share = alpha[..., None].astype(np.float64) / 255
    assert np.abs(decoded - (image * share + 255 * (1 - share))).max() <= 1.0
    palette = Image.new("P", (5, 5), 0)
    palette.putpalette([10, 20, 30])
    assert (decode.decode(encoded(palette, "PNG", transparency=0)) == 255).all()


def test_cmyk_jpeg_decodes_to_the_colours_it_was_made_from():
    image = photo()
    data = encoded(Image.fromarray(image).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(decode.decode(data).astype(int) - image).mean() < 3


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (7, 5), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode.decode(data), np.asarray(frames[0]))


def test_damaged_images_raise_one_clear_error():
    data = encoded(Image.fromarray(photo()), "JPEG")
    with pytest.raises(ValueError, match="damaged JPEG"):
        decode.decode(data[: len(data) // 2])
    for junk in (b"", b"not an image", data[:3], b"\x00" * 100):
        with pytest.raises(ValueError, match="not a readable image"):
            decode.decode(junk)


def test_damage_anywhere_in_a_file_never_escapes_as_another_error():
    rng = generator(3)
    for file_format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(Image.fromarray(photo()), file_format)
        for _ in range(30):
            broken = bytearray(data)
            for position in rng.integers(0, len(data), 8):
                broken[position] ^= int(rng.integers(1, 256))
            try:
                assert decode.decode(bytes(broken)).dtype == np.uint8
            except ValueError as error:
                assert "image" in str(error) or "damaged" in str(error)


def test_an_image_with_too_many_pixels_is_refused_before_decoding():
    data = encoded(Image.new("1", (9000, 9000)), "PNG")
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        decode.decode(data)


def test_what_is_no_image_is_not_blamed_on_one_format(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    for data in (b"not an image", b"\x89PNG\r\n\x1a\n1234", str(tmp_path / "a.jpg")):
        with pytest.raises(ValueError, match=r"^not a readable image \(cannot identify image file"):
            decode.open_image(data)
    with pytest.raises(ValueError, match=r"not a readable image \(it is empty\)"):
        decode.open_image(b"")
    frames = [Image.fromarray(photo()), Image.new("RGB", (7, 5), "red")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode.open_image(data).format == "MPO" and decode.decode(data).shape == photo().shape


def claiming(width, height):
    """A small JPEG whose header says another size."""
    data = encoded(Image.new("RGB", (64, 64)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def test_a_jpeg_that_claims_more_pixels_than_its_bytes_can_hold_is_refused_by_its_header(tmp_path):
    (tmp_path / "a.jpg").write_bytes(claiming(8000, 8000))
    for data in (claiming(8000, 8000), str(tmp_path / "a.jpg")):
        with pytest.raises(ValueError, match=r"damaged JPEG .* bytes cannot hold 8000 x 8000 pixels"):
            decode.open_image(data)
    smallest = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True, optimize=True)
    assert decode.decode(smallest).shape == (4000, 4000, 3)


def test_large_images_are_decoded_one_after_the_other_and_small_ones_side_by_side(monkeypatch):
    data, most, now = encoded(Image.new("RGB", (40, 30)), "PNG"), [], []

    def read(_):
        with decode.reading(data) as image:
            now.append(image)
            most.append(len(now))
            time.sleep(0.01)
            now.pop()

    for pixels, expected in ((40 * 30, 1), (3 * 40 * 30, 3)):
        monkeypatch.setattr(decode, "_free", pixels)
        most.clear()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(16)))
        assert max(most) == expected and decode._free == pixels


def test_a_format_outside_the_list_is_refused():
    with pytest.raises(ValueError, match="not a readable image"):
        decode.decode(encoded(Image.fromarray(photo()), "PPM"))


# The card's resize and crop


@pytest.mark.parametrize("shape", [(60, 83), (83, 60), (256, 341), (8, 8), (33, 500), (224, 224)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_preprocessing_equals_torchvision(transforms, shape, interpolation):
    from torchvision.transforms import InterpolationMode

    image = photo(*shape)
    for size, crop in ((224, 0.875), (224, 0.9), (32, 1.0), (225, 0.95)):
        ours = make_preprocess(Card("m", 2, input_size=size, crop=crop, interpolation=interpolation))(image)
        resized = transforms.resize(Image.fromarray(image), int(size / crop), InterpolationMode(interpolation))
        same_as_pil(ours, transforms.center_crop(resized, size))


def test_resize_size_is_the_floor_of_input_size_over_crop():
    assert make_preprocess(Card("m", 2, input_size=224, crop=0.9)).resize_size == (248, 248)
    assert make_preprocess(Card("m", 2, input_size=224, crop=0.875)).resize_size == (256, 256)


# Augmentations


def test_flip_mirrors_half_of_the_images():
    image = photo(8, 8)
    flipped = [ops.flip(image, generator(seed)) for seed in range(400)]
    mirrored = sum(np.array_equal(f, image[:, ::-1]) for f in flipped)
    assert all(np.array_equal(f, image) or np.array_equal(f, image[:, ::-1]) for f in flipped)
    assert 160 < mirrored < 240  # binomial(400, 1/2), four standard deviations
    assert np.array_equal(ops.flip(image, generator(), probability=0.0), image)


def test_random_resized_crop_boxes_are_distributed_as_torchvisions(transforms, monkeypatch):
    import torch
    from torchvision.transforms import RandomResizedCrop

    boxes, ratio = [], (0.2, 3.0)  # wide enough to tell a log-uniform draw from a uniform one
    monkeypatch.setattr(ops, "_scale", lambda image, *_: boxes.append(image.shape[:2] + tuple(image[0, 0])))
    rows, columns = np.mgrid[:90, :120]
    image = np.dstack([rows, columns, rows * 0]).astype(np.uint8)  # the top left pixel tells the position
    for seed in range(2000):
        options = {"size": 8, "interpolation": "bilinear", "scale": (0.05, 0.4), "ratio": ratio}
        ops.random_resized_crop(image, generator(seed), **options)
    torch.manual_seed(0)
    picture = torch.zeros(3, 90, 120)
    theirs = [RandomResizedCrop.get_params(picture, (0.05, 0.4), ratio) for _ in range(2000)]
    theirs = np.array([(h, w, top, left) for top, left, h, w in theirs], float)
    for ours, reference in zip(np.array(boxes, float)[:, :4].T, theirs.T, strict=True):
        grid = np.arange(121)
        gap = np.abs((ours[:, None] <= grid).mean(0) - (reference[:, None] <= grid).mean(0)).max()
        assert gap < 1.95 * np.sqrt(2 / 2000)  # two-sample Kolmogorov-Smirnov at 0.1 %


def test_random_resized_crop_falls_back_to_the_largest_central_box():
    image = np.zeros((10, 200, 3), np.uint8)
    image[:, 93:106] = 255  # 10 * 4/3 pixels in the middle
    cut = ops.random_resized_crop(image, generator(), size=10, interpolation="nearest", scale=(1.0, 1.0))
    assert cut.shape == (10, 10, 3) and (cut == 255).all()


def test_random_resized_crop_resizes_its_box_as_torchvision(transforms):
    from torchvision.transforms import InterpolationMode

    image, rng = photo(), generator(5)
    area = 60 * 83 * rng.uniform(0.5, 0.5)
    aspect = np.exp(rng.uniform(0, 0))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    top, left = int(rng.integers(60 - h + 1)), int(rng.integers(83 - w + 1))
    ours = ops.random_resized_crop(
        image, generator(5), size=32, interpolation="bicubic", scale=(0.5, 0.5), ratio=(1.0, 1.0)
    )
    box = (top, left, h, w)
    same_as_pil(ours, transforms.resized_crop(Image.fromarray(image), *box, (32, 32), InterpolationMode.BICUBIC))


def test_random_crop_reaches_every_offset_of_the_padded_image():
    image = photo(8, 8)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    assert {ops.random_crop(image, generator(s), size=8, padding=2).tobytes() for s in range(400)} == windows
    with pytest.raises(ValueError, match=r"random_crop of 32 .* 12 x 12"):
        ops.random_crop(image, generator(), size=32, padding=2)


def test_rotation_equals_torchvision_and_stays_within_its_degrees(transforms):
    from torchvision.transforms import InterpolationMode

    image = photo()
    for seed in range(5):
        angle = generator(seed).uniform(-30, 30)
        ours = ops.rotation(image, generator(seed), degrees=30.0, fill=7)
        same_as_pil(ours, transforms.rotate(Image.fromarray(image), angle, InterpolationMode.BILINEAR, fill=[7, 7, 7]))


def test_zoom_equals_torchvisions_affine_scale(transforms):
    from torchvision.transforms import InterpolationMode

    image = photo()
    for seed in range(5):
        factor = generator(seed).uniform(0.5, 1.5)
        theirs = transforms.affine(Image.fromarray(image), 0, [0, 0], factor, [0], InterpolationMode.BILINEAR)
        same_as_pil(ops.zoom(image, generator(seed), factor=(0.5, 1.5)), theirs)


def test_translation_moves_whole_pixels_within_its_fraction():
    image, seen = photo(10, 20), set()
    for seed in range(300):
        rng = generator(seed)
        dx, dy = (round(rng.uniform(-0.2, 0.2) * side) for side in (20, 10))
        moved = Image.new("RGB", (20, 10), (9, 9, 9))
        moved.paste(Image.fromarray(image), (dx, dy))
        same_as_pil(ops.translation(image, generator(seed), fraction=0.2, fill=9), moved)
        seen.add((dx, dy))
    assert {dx for dx, _ in seen} == set(range(-4, 5)) and {dy for _, dy in seen} == set(range(-2, 3))


def test_colour_jitter_equals_torchvision_step_by_step(transforms):
    image = photo()
    for seed in range(12):
        rng = generator(seed)
        factors = [rng.uniform(max(0, 1 - a), 1 + a) for a in (0.4, 1.5, 0.3)]
        hue = rng.uniform(-0.2, 0.2)
        steps = [
            lambda x, f=factors: transforms.adjust_brightness(x, f[0]),
            lambda x, f=factors: transforms.adjust_contrast(x, f[1]),
            lambda x, f=factors: transforms.adjust_saturation(x, f[2]),
            lambda x, h=hue: transforms.adjust_hue(x, h),
        ]
        expected = Image.fromarray(image)
        for k in rng.permutation(4):
            expected = steps[k](expected)
        jitter = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.3, "hue": 0.2}
        same_as_pil(ops.colour_jitter(image, generator(seed), **jitter), expected)


TORCHVISION_NAMES = {
    "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "color": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize", "solarize": "Solarize",
    "autocontrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip


@pytest.mark.parametrize("name", ra.NAMES)
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_every_rand_augment_operation_equals_torchvisions(transforms, name, magnitude):
    from torchvision.transforms import InterpolationMode, RandAugment
    from torchvision.transforms.autoaugment import _apply_op

    image = Image.fromarray(photo())
    table, signed = RandAugment()._augmentation_space(31, (60, 83))[TORCHVISION_NAMES[name]]
    assert signed == (name in ra.SIGNED)
    theirs = float(table[magnitude]) if table.ndim else 0.0
    ours = ra.strength(name, magnitude, image.size)
    if table.ndim:
        assert ours == pytest.approx(theirs, rel=1e-6)
    for sign in (1, -1) if signed else (1,):
        expected = _apply_op(image, TORCHVISION_NAMES[name], sign * theirs, InterpolationMode.NEAREST, None)
        same_as_pil(ra.apply(image, name, sign * ours), expected)
    assert set(RandAugment()._augmentation_space(31, (60, 83))) == set(TORCHVISION_NAMES.values())


def test_rand_augment_draws_all_operations_and_applies_the_given_number(monkeypatch):
    drawn = []
    monkeypatch.setattr(ra, "apply", lambda image, name, strength: drawn.append((name, strength > 0)) or image)
    for seed in range(700):
        ops.rand_augment(photo(8, 8), generator(seed), layers=3, magnitude=5)
    assert len(drawn) == 2100
    counts = [sum(name == d for d, _ in drawn) for name in ra.NAMES]
    assert np.abs(np.array(counts) - 150).max() < 4 * 12  # binomial(2100, 1/14), four standard deviations
    assert {up for name, up in drawn if name == "rotate"} == {True, False}


def test_random_erasing_overwrites_a_box_of_the_promised_size():
    image = np.zeros((40, 50, 3), np.uint8)
    erased = [ops.random_erasing(image, generator(s), probability=0.5, scale=(0.1, 0.2)) for s in range(300)]
    changed = [e for e in erased if e.any()]
    assert 115 < len(changed) < 185 and not image.any()
    for e in changed:
        rows, columns = np.flatnonzero(e.any((1, 2))), np.flatnonzero(e.any((0, 2)))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.08 < h * w / 2000 < 0.22 and 0.27 < h / w < 3.7
        assert (e[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] > 0).mean() > 0.97  # noise, not a constant
        assert e.std() > 0


@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_is_a_function_of_image_and_stream_and_leaves_its_input_alone(name):
    card = Card("m", 2, input_size=24, crop=0.8)
    preprocess = make_preprocess(card, [(name, {})])
    image = photo(30, 41)
    before = image.copy()
    image.flags.writeable = False
    first, again = preprocess(image, generator(11)), preprocess(image, generator(11))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)
    assert first.shape == (24, 24, 3) and first.dtype == np.uint8


# Checks of the config


def test_all_mistakes_in_the_augmentations_are_told_at_once():
    with pytest.raises(ValueError) as error:
        make_preprocess(
            Card("m", 2),
            [
                ("flp", {}),
                ("rotation", {"degree": 5}),
                ("zoom", {"factor": (1.2, 0.8)}),
                ("random_erasing", {"probability": 2, "scale": (0.1, 1.5)}),
                ("colour_jitter", {"hue": 0.9}),
                ("rand_augment", {"layers": 1.5}),
                "flip",
            ],
        )
    for part in ("'flip'", "'degrees'", "zoom: factor = ", "random_erasing: probability = ", "random_erasing: scale = ",
                 "with 0 < low <= high <= 1", "colour_jitter: hue = ", "rand_augment: layers = ",
                 "'flip' is not a pair"):  # fmt: skip
        assert part in str(error.value)


def test_size_and_interpolation_come_from_the_card_unless_given():
    card = Card("m", 2, input_size=20, crop=0.5, interpolation="bilinear")
    filled = dict(make_preprocess(card, [("resize", {}), ("random_resized_crop", {"size": 12})]).ops)
    assert filled["resize"] == {"size": 40, "interpolation": "bilinear"}
    assert filled["random_resized_crop"] == {"size": 12, "interpolation": "bilinear"}


def test_a_card_with_an_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="'cubic' is none of"):
        make_preprocess(Card("m", 2, interpolation="cubic"))


def test_every_parameter_has_a_check():
    defaults = {"size": 4, "interpolation": "box"}
    for name in ops.OPS:
        parameters = set(inspect.signature(ops.OPS[name]).parameters) - {"image", "rng"}
        assert set(checks.parameters(ops.OPS[name])) == parameters
        for parameter in parameters:
            with pytest.raises(ValueError, match=rf"{name}: {parameter} = 'nonsense', expected"):
                make_preprocess(Card("m", 2), [(name, {parameter: "nonsense"})])
            if parameter in defaults:
                make_preprocess(Card("m", 2), [(name, {parameter: defaults[parameter]})])


def test_flip_alone_sees_the_same_crop_as_evaluation():
    card, image = Card("m", 2, input_size=24, crop=0.75), photo(24, 24)
    flipped = make_preprocess(card, [("flip", {"probability": 1})])(image, generator())
    np.testing.assert_array_equal(flipped, make_preprocess(card)(image[:, ::-1]))
    assert not np.array_equal(flipped, np.asarray(ImageOps.mirror(Image.fromarray(image))))


def test_an_image_so_narrow_that_its_resize_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="1 x 2000000 pixels, which would be resized to 64 x 128000000"):
        ops.resize(np.zeros((2_000_000, 1, 3), np.uint8), size=64, interpolation="bilinear")
