"""Images that are no 8-bit RGB squares: other sides, channels and types of pixels, from files to what a run saves."""

import argparse
import io
import json
import re
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

import tl_jax
from tl_jax import __main__ as command
from tl_jax import config as options
from tl_jax.core.card import Card, Form
from tl_jax.data import duplicates, pipeline, sources
from tl_jax.data.image import decode, ops
from tl_jax.data.image.augment import make_preprocess
from tl_jax.data.pipeline import View
from tl_jax.data.readers import pack
from tl_jax.weights import load

DEEP = {"pixels": "uint16", "scale": 65535.0}
GREY = {"mean": (0.4,), "std": (0.2,)}
QUIET = {"report": lambda text: None}


def smooth(height, width, channels=3, seed=0):
    """A smooth random image, float64 [height, width, channels] in 0 .. 1."""
    small = np.random.default_rng(seed).random((5, 6, channels))
    planes = [Image.fromarray(np.float32(plane)) for plane in np.moveaxis(small, 2, 0)]
    stack = np.stack([np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in planes], axis=2)
    return stack.clip(0, 1)


def encoded(image, file_format, **options):
    stream = io.BytesIO()
    if file_format == "NPY":
        np.save(stream, image)
    else:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, file_format, **options)
    return stream.getvalue()


# Sizes


@pytest.fixture
def timm_eval():
    """timm's evaluation transform, as the uint8 image [H, W, 3] that it makes."""
    pytest.importorskip("torch_reference")
    factory = pytest.importorskip("timm.data.transforms_factory")

    def apply(image, **options):
        made = factory.transforms_imagenet_eval(use_prefetcher=True, mean=(0.485, 0.456, 0.406), **options)
        return made(Image.fromarray(image)).numpy().transpose(1, 2, 0)

    return apply


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 40)])
def test_evaluation_prepares_any_size_and_mode_as_timm(timm_eval, size, mode):
    for (height, width), crop, interpolation in (
        ((60, 83), 0.875, "bicubic"),
        ((83, 60), 1.0, "bilinear"),
        ((20, 97), 0.9, "bicubic"),
    ):
        image = np.uint8(255 * smooth(height, width))
        card = Card("m", 2, input_size=size, crop=crop, interpolation=interpolation, crop_mode=mode)
        theirs = timm_eval(image, img_size=size, crop_pct=crop, crop_mode=mode, interpolation=interpolation)
        for given in (image, Image.fromarray(image)):
            np.testing.assert_array_equal(make_preprocess(card)(given), theirs)


def test_training_crops_have_both_sides_as_in_torchvision(timm_eval):
    import torchvision.transforms.functional as transforms

    image, box = np.uint8(255 * smooth(60, 83)), {"scale": (1.0, 1.0), "ratio": (83 / 60, 83 / 60)}
    preprocess = make_preprocess(Card("m", 2, input_size=(24, 40)), [("random_resized_crop", box)])
    whole = preprocess(Image.fromarray(image), np.random.default_rng(0))
    theirs = transforms.resize(Image.fromarray(image), (24, 40), transforms.InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(whole, np.asarray(theirs))
    for augment in ([("random_crop", {"padding": 2})], [("resize", {}), ("random_crop", {})], [("flip", {})]):
        preprocess = make_preprocess(Card("m", 2, input_size=(24, 40)), augment)
        assert preprocess(image, np.random.default_rng(0)).shape == (24, 40, 3)
    squashed = ops.resize(image, size=(24, 40), interpolation="bicubic", crop_mode="squash")
    np.testing.assert_array_equal(squashed, np.asarray(theirs))


# Decoding


def ramp(dtype, channels=0):
    values = np.linspace(0, 1, 7 * 5 * max(channels, 1)).reshape(7, 5, *([channels] if channels else []))
    return (values * (1 if dtype == "float32" else np.iinfo(dtype).max)).astype(dtype)


@pytest.mark.parametrize(
    ("form", "kind", "dtype"),
    [
        (Form("uint16", 1), "PNG", "uint16"),
        (Form("uint16", 1), "TIFF", "uint16"),
        (Form("uint16", 3), "PNG", "uint16"),
        (Form("float32", 1), "TIFF", "float32"),
        (Form("int16", 1), "NPY", "int16"),
        (Form("float32", 1), "NPY", "float32"),
        (Form("uint8", 1), "PNG", "uint8"),
    ],
)
def test_grey_files_keep_every_bit_of_their_values(form, kind, dtype):
    values = ramp(dtype)
    found = decode.decode(encoded(values, kind), form)
    assert found.dtype == form.dtype and found.shape == (7, 5, form.channels)
    np.testing.assert_array_equal(found, np.repeat(values[..., None], form.channels, axis=2))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_several_channels_are_those_of_a_npy_file_or_the_pages_of_a_tiff(dtype):
    values = ramp(dtype, 5)
    np.testing.assert_array_equal(decode.decode(encoded(values, "NPY"), Form(dtype, 5)), values)
    if dtype != "int16":  # Pillow writes none
        first, *others = (Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(values, 2, 0))
        data = encoded(first, "TIFF", save_all=True, append_images=others)
        np.testing.assert_array_equal(decode.decode(data, Form(dtype, 5)), values)


def test_four_channels_of_a_png_are_those_of_the_file_and_grey_is_pillows():
    values = ramp("uint8", 4)
    image = Image.fromarray(values)
    np.testing.assert_array_equal(decode.decode(encoded(image, "PNG"), Form("uint8", 4)), values)
    pair = image.convert("LA")
    np.testing.assert_array_equal(decode.decode(encoded(pair, "PNG"), Form("uint8", 2)), np.asarray(pair))
    photo = Image.fromarray(np.uint8(255 * smooth(30, 40)))
    grey = np.asarray(photo.convert("L"))[..., None]
    np.testing.assert_array_equal(decode.decode(encoded(photo, "PNG"), Form("uint8", 1)), grey)
    np.testing.assert_array_equal(decode.as_form(np.asarray(photo), Form("uint8", 1)), grey)


@pytest.mark.parametrize(
    ("data", "form", "message"),
    [
        (encoded(ramp("uint16"), "PNG"), Form(), "pixels are uint16, expected uint8"),
        (encoded(ramp("uint8"), "PNG"), Form("uint16", 1), "pixels are uint8, expected uint16"),
        (encoded(ramp("float32"), "TIFF"), Form("uint16", 1), "pixels are float32, expected uint16"),
        (encoded(ramp("int16").astype(np.int32), "TIFF"), Form("int16", 1), "pixels are int32, expected int16"),
        (encoded(ramp("uint8", 4), "NPY"), Form(), "4 channels, expected 3"),
        (encoded(ramp("uint8", 3), "PNG"), Form("uint8", 4), "3 channels, expected 4"),
        (encoded(ramp("uint8", 4), "NPY")[:-3], Form("uint8", 4), "damaged .npy"),
        (encoded(np.array([{}]), "NPY"), Form(), "damaged .npy|an image is"),
        (encoded(np.zeros((2, 3, 4, 5), np.uint8), "NPY"), Form(), r"\[2, 3, 4, 5\]; an image is \[H, W\]"),
        (encoded(np.array([[1.0, np.nan]]), "NPY"), Form("float32", 1), "1 of its pixel values are not finite"),
    ],
)
def test_what_is_not_of_the_form_is_refused(data, form, message):
    with pytest.raises(ValueError, match=message):
        decode.decode(data, form)


def test_damage_anywhere_in_a_deep_file_is_one_kind_of_error():
    pages = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(ramp("float32", 3), 2, 0)]
    for data, form in (
        (encoded(ramp("uint16"), "PNG"), Form("uint16", 1)),
        (encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), Form("float32", 3)),
        (encoded(ramp("float32", 2), "NPY"), Form("float32", 2)),
    ):
        rng = np.random.default_rng(0)
        for _ in range(100):
            broken = bytearray(data)
            for position in rng.integers(0, len(data), 8):
                broken[position] ^= int(rng.integers(1, 256))
            for read in (decode.header_of, decode.decode):
                try:
                    read(bytes(broken), form)
                except ValueError as error:
                    assert re.search("image|damaged|array|pixel values", str(error))


def png_of_sixteen_bits(values):
    """uint16 RGB [H, W, 3] as a PNG, which Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">2I5B", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("form", [Form(), Form("uint16", 3)])
def test_sixteen_bits_in_several_channels_are_not_read_as_eight(form):
    data = png_of_sixteen_bits(ramp("uint16", 3))
    assert Image.open(io.BytesIO(data)).mode == "RGB"  # of which Pillow reads the upper 8 bits
    with pytest.raises(ValueError, match=f"16-bit RGB, of which 8 bits can be read .*, expected {form.pixels}"):
        decode.decode(data, form)
    bitmap = Image.new("RGB", (5, 4))
    bitmap.tile = [type("Tile", (), {"args": "BGR;16"})]  # 5, 6 and 5 bits
    assert decode._header(bitmap, Form()).pixels == "uint8"


def test_resizing_of_deep_images_is_that_of_floats_without_steps():
    values = np.uint16(65535 * smooth(60, 83, 1)[..., 0])
    card = Card("m", 2, input_size=(24, 40), crop=1.0, **DEEP, **GREY)
    with decode.reading(encoded(values, "PNG"), card.form) as image:
        found = make_preprocess(card)(image)
    factor = max(24 / 60, 40 / 83)
    resized = Image.fromarray(np.float32(values)).resize(
        (round(83 * factor), round(60 * factor)), Image.Resampling.BICUBIC
    )
    top = round((resized.height - 24) / 2)
    np.testing.assert_array_equal(found[..., 0], np.asarray(resized)[top : top + 24])
    assert len(np.unique(found)) > 900  # of 960 pixels; 8 bits have 256 values


def test_augmentations_work_on_any_channels_and_floats_and_colours_are_refused():
    values = np.float32(1000 * smooth(30, 40, 2))
    geometric = [("rotation", {"degrees": 20.0}), ("zoom", {}), ("translation", {}), ("flip", {}), ("random_crop", {})]
    card = Card("m", 2, input_size=(24, 32), mean=(0.5,) * 2, std=(1.0,) * 2, pixels="float32", scale=1000.0)
    made = make_preprocess(card, geometric)(values, np.random.default_rng(1))
    alone = make_preprocess(card.replace(mean=(0.5,), std=(1.0,)), geometric)
    for channel in range(2):
        expected = alone(values[..., channel : channel + 1], np.random.default_rng(1))
        np.testing.assert_array_equal(made[..., channel : channel + 1], expected)
    with pytest.raises(ValueError, match=r"(?s)2 channels of float32; .*colour_jitter: .*8 bits of RGB\n  random_eras"):
        make_preprocess(card, [("colour_jitter", {}), ("random_erasing", {})])
    make_preprocess(card.replace(pixels="uint8", scale=0.0), [("random_erasing", {})])


# Cards


def test_a_card_says_what_pixels_mean_and_old_cards_stay_as_they_are():
    card = Card("m", 2, crop_mode="squash", **DEEP, **GREY)
    assert Card.from_json(card.to_json()) == card and card.divisor == 65535 and card.form == Form("uint16", 1)
    assert not {"crop_mode", "pixels", "scale"} & set(json.loads(Card("m", 2).to_json()))
    assert Card("m", 2).divisor == 255
    for fields, message in (
        ({"pixels": "uint16"}, "give the scale"),
        ({"pixels": "float32", "scale": -1.0}, "give the scale"),
        ({"pixels": "uint32"}, "pixels of uint8, uint16"),
        ({"crop_mode": "fit"}, "crop_mode of center, squash, border"),
    ):
        with pytest.raises(ValueError, match=message):
            Card("m", 2, **fields)
    assert Card("m", 2).override(DEEP, allowed=False).scale == 65535  # what the files hold contradicts no weights
    with pytest.raises(ValueError, match=r"model\.channels"):
        Card("m", 2).override(GREY, allowed=True)


def test_sizes_of_the_command_line_and_of_configs_are_a_side_or_both():
    base = options.make()
    for text, size in (("64", 64), ("(64, 96)", (64, 96))):
        config = options.parse(base, f"model.image_size={text}")
        options.check(config)
        assert config.model.image_size == size
    for wrong in ((64,), (64, 0), "64", (64, 96, 3)):
        with pytest.raises(ValueError, match=r"model.image_size = .*a pair \(height, width\)"):
            options.check(options.override(base, {"model.image_size": wrong}))
    assert [command._PIXELS(text) for text in ("224", "192x256")] == [224, (192, 256)]
    with pytest.raises(argparse.ArgumentTypeError, match="192x"):
        command._PIXELS("192x")


# Sources


def write_scans(root, count=8, kind="png", values=np.uint16, shape=(30, 44), labels=False):
    """Scans of two classes, dark and light, of 12 bits; in class folders, or flat with labels.csv."""
    rows, rng = ["file,split,kind"], np.random.default_rng(0)
    for split, number in {"train": count, "val": 4}.items():
        for c, name in enumerate(("dark", "light")):
            for i in range(number):
                level = 0.2 + 0.4 * c + 0.2 * smooth(*shape, 1, seed=int(rng.integers(10**6)))[..., 0]
                scan = (level if values is np.float32 else level * 4095).astype(values)
                path = root / f"{split}_{name}_{i}.{kind}" if labels else root / split / name / f"{i}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(scan, {"png": "PNG", "tif": "TIFF", "npy": "NPY"}[kind]))
                rows.append(f"{path.name},{split},{name}")
    if labels:
        (root / "labels.csv").write_text("\n".join(rows))
        return f"csv:{root}/labels.csv"
    return f"folder:{root}"


SCANS = {"pixels": "uint16", "scale": 4095.0}
SCAN_CARD = Card("m", 2, input_size=(16, 24), crop=1.0, **SCANS, **GREY)


@pytest.mark.parametrize("labels", [False, True])
def test_folders_tables_and_packs_give_the_same_deep_batches(tmp_path, labels):
    source = write_scans(tmp_path / "scans", labels=labels)
    found = sources.load(source, "val", form=SCAN_CARD.form)
    views = {"image": View(SCAN_CARD, (("random_resized_crop", {}), ("flip", {})))}
    batch = pipeline.eval_batches(found, views, 8)[0]["image"]
    assert batch.dtype == np.float32 and batch.shape == (8, 16, 24, 1) and len(np.unique(batch)) > 2800
    pack.pack(source, str(tmp_path / "p"), ("train", "val"), size=64, form=SCAN_CARD.form, **QUIET)
    packed = [sources.load(f"packed:{tmp_path}/p", split, form=SCAN_CARD.form) for split in ("train", "val")]
    np.testing.assert_array_equal(pipeline.eval_batches(packed[1], views, 8)[0]["image"], batch)
    train = [
        pipeline.train_batches(each, views, 4, 0) for each in (sources.load(source, form=SCAN_CARD.form), packed[0])
    ]
    for made in zip(*(each.iterate(0, 3, num_workers=0) for each in train), strict=True):
        np.testing.assert_array_equal(made[0]["image"], made[1]["image"])
    with pytest.raises(ValueError, match=r"pixels are uint16, expected uint8; say what the files hold by data.card"):
        sources.load(f"packed:{tmp_path}/p", "val")


def test_a_pack_that_makes_deep_images_smaller_keeps_sixteen_bits(tmp_path):
    source = write_scans(tmp_path / "scans", count=2)
    command.main(["pack", source, str(tmp_path / "p"), "--size", "16", "--pixels", "uint16", "--channels", "1"])
    packed = sources.load(f"packed:{tmp_path}/p", form=SCAN_CARD.form)
    assert packed.inputs[0].dtype == np.uint16 and packed.inputs[0].shape == (16, 23, 1)
    with decode.reading(sources.load(source, form=SCAN_CARD.form).inputs[0], SCAN_CARD.form) as image:
        exact = ops.resize(image, size=16, interpolation="bicubic")
    assert np.abs(packed.inputs[0] - exact).max() <= 0.5


def test_worker_processes_hand_over_floats(tmp_path):
    source = sources.load(write_scans(tmp_path), form=SCAN_CARD.form)
    batches = pipeline.train_batches(source, {"image": View(SCAN_CARD, (("flip", {}),))}, 4, 0)
    for made, expected in zip(batches.iterate(0, 3, num_workers=1), map(batches.__getitem__, range(3)), strict=True):
        np.testing.assert_array_equal(made["image"], expected["image"])


def test_one_error_lists_the_files_that_hold_something_else(tmp_path):
    source = write_scans(tmp_path)
    for name in ("train/dark/1.png", "train/light/3.png"):
        Image.new("L", (44, 30)).save(tmp_path / name)
    expected = (
        r"(?s)2 of 16 files .* as 1 channel of uint16; say .*dark/1.png: an image whose pixels are uint8.*light/3"
    )
    with pytest.raises(ValueError, match=expected):
        sources.load(source, form=SCAN_CARD.form)
    assert len(sources.load(source, form=SCAN_CARD.form, on_error="skip")) == 14
    with pytest.raises(ValueError, match=r"14 of 16 files .* as 3 channels of uint8; say what the files hold"):
        sources.load(source)


def test_arrays_of_any_type_are_read_as_the_card_says(tmp_path):
    images = np.float32(smooth(8, 8, 4)) * np.arange(1, 5, dtype=np.float32)[:, None, None, None]
    np.savez(tmp_path / "x.npz", image=images, label=[0, 1, 0, 1])
    card = Card("m", 2, input_size=8, crop=1.0, mean=(0.5,) * 4, std=(0.5,) * 4, pixels="float32", scale=1.0)
    found = sources.load(f"arrays:{tmp_path}/x.npz", form=card.form)
    np.testing.assert_array_equal(pipeline.eval_batches(found, {"image": View(card)}, 4)[0]["image"], images)
    with pytest.raises(ValueError, match="not 3 channels of uint8: an image whose pixels are float32"):
        sources.load(f"arrays:{tmp_path}/x.npz")
    grey = sources.load("digits", form=Form("uint8", 1))
    assert grey.inputs.shape == (1029, 8, 8, 1)
    np.testing.assert_array_equal(grey.inputs, sources.load("digits").inputs[..., :1])
    with pytest.raises(ValueError, match="corruptions are defined for 8-bit"):
        sources.load("corrupt:contrast:1:digits", form=Form("uint8", 4))


def test_tfds_records_keep_their_sixteen_bits(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    values, label = ramp("uint16"), tfds.features.ClassLabel(names=["a", "b"])
    image = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16)

    class DeepScans(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, manager):
            return {"train": ((i, {"image": io.BytesIO(encoded(values, "PNG")), "label": i}) for i in range(2))}

        def _generate_examples(self):
            raise NotImplementedError

    DeepScans(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    found = sources.load("tfds:deep_scans", data_dir=str(tmp_path), form=SCAN_CARD.form)
    batch = pipeline.eval_batches(found, {"image": View(SCAN_CARD.replace(input_size=(7, 5)))}, 2)[0]["image"]
    np.testing.assert_array_equal(batch, np.stack([values, values])[..., None])


def test_copies_of_deep_images_are_found_and_drawn_by_their_own_range(tmp_path):
    source = write_scans(tmp_path, shape=(80, 96), count=3)
    scan = np.asarray(Image.open(tmp_path / "train/dark/0.png")).astype(np.float64)
    Image.fromarray(np.uint16(scan * 0.8 + 100)).save(tmp_path / "val/dark/copy.png")
    found = {split: sources.load(source, split, form=SCAN_CARD.form) for split in ("train", "val")}
    pairs = duplicates.find(found, ["train"])["pairs"]
    assert ["near", "train: train/dark/0.png", "val: val/dark/copy.png"] in pairs
    drawn = np.asarray(decode.picture(np.float32(scan)[..., None]))
    assert (drawn.min(), drawn.max()) == (0, 255) and drawn.shape == (80, 96, 3)


# Networks


@pytest.mark.thin(1)
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_the_kernel_of_a_stem_is_summed_or_repeated_as_timm_does(channels, tmp_path):
    three = load.load("resnet8_cifar", "builtin:glyphs")
    given = {} if channels == 1 else {"mean": (0.4,) * channels, "std": (0.2,) * channels}
    loaded = load.load("resnet8_cifar", "builtin:glyphs", channels=channels, **given)
    kernel, found = (x.variables["params"]["backbone"]["stem"]["conv"]["kernel"] for x in (three, loaded))
    kernel = np.asarray(kernel)
    expected = {1: kernel.sum(2, keepdims=True), 2: kernel[:, :, :2] * 1.5}
    expected |= {n: np.concatenate([kernel] * 3, axis=2)[:, :, :n] * np.float32(3 / n) for n in (4, 7)}
    np.testing.assert_array_equal(found, expected[channels])
    note = f"conv1.weight (resampled from 3 to {channels} channels)"
    assert [origin for origin in loaded.origins.values() if "channels" in origin] == [note]
    load.export(loaded.variables, "resnet8_cifar", tmp_path / "own.safetensors", card=loaded.card)
    again = load.load("", tmp_path / "own.safetensors")  # with its channels by itself
    assert again.card == loaded.card and set(again.origins.values()).isdisjoint([note])
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    with pytest.raises(ValueError, match=f"for images of {channels} channels give channels={channels}"):
        load.load("", tmp_path / "own.safetensors", channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)


def test_statistics_of_channels_follow_from_the_card_or_are_asked_for(tmp_path):
    grey = load.load("resnet8_cifar", num_classes=2, channels=1).card
    assert (grey.mean, grey.std) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    equal = load.load("lenet", num_classes=2, channels=5).card
    assert equal.mean == equal.std == (0.5,) * 5
    with pytest.raises(ValueError, match=r"channels=4: .*resnet18 has mean .*give mean and std with 4 numbers"):
        load.load("resnet18", channels=4)
    with pytest.raises(ValueError, match=r"give std with 4 numbers"):
        load.load("resnet18", channels=4, mean=(0.5,) * 4, std=(0.2,) * 3)
    with pytest.raises(ValueError, match="reads a table"):
        load.load("mlp_small", num_classes=2, columns=("a", "b"), channels=4)


CASES = [
    ("resnet18", "conv1.weight", (64, 96)),
    ("vit_tiny_patch16_224", "patch_embed.proj.weight", (64, 96)),
    ("inception_v3", "Conv2d_1a_3x3.conv.weight", (107, 139)),
    ("efficientnet_b0", "conv_stem.weight", (64, 96)),
    ("mobilenetv3_small_050", "conv_stem.weight", (64, 96)),
    ("convnext_atto", "stem.0.weight", (64, 96)),
    ("densenet121", "features.conv0.weight", (64, 96)),
    ("vgg11_bn", "features.0.weight", (64, 96)),
    ("vit_small_patch14_dinov2", "patch_embed.proj.weight", (56, 84)),
    ("vit_base_patch32_clip_224", "patch_embed.proj.weight", (64, 96)),
    ("vit_base_patch16_siglip_224", "patch_embed.proj.weight", (64, 96)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stem", "size"), CASES)
@pytest.mark.parametrize("channels", [4, 1])
def test_stems_for_other_channels_are_timms_also_on_images_that_are_no_squares(tmp_path, name, stem, size, channels):
    reference, timm = pytest.importorskip("torch_reference"), pytest.importorskip("timm")
    from safetensors.torch import load_file
    from timm.models import adapt_input_conv

    towers = name.endswith("dinov2") or "siglip" in name
    options = {"num_classes": 0 if towers else 7, **({"img_size": size} if name.startswith("vit") else {})}
    options |= {"aux_logits": False} if name == "inception_v3" else {}
    theirs = reference.randomize(timm.create_model(name, **options))
    file = reference.save(theirs, tmp_path / "three.pth")
    state = {**theirs.state_dict(), stem: adapt_input_conv(channels, theirs.state_dict()[stem])}
    adapted = timm.create_model(name, in_chans=channels, **options).eval()
    adapted.load_state_dict(state)
    images = np.random.default_rng(0).standard_normal((1, *size, channels)).astype(np.float32)
    expected = reference.record(adapted, {}, images)[0]
    given = {"mean": (0.4,) * channels, "std": (0.2,) * channels}
    classes = 0 if towers else None
    loaded = load.load(name, file, classes, image_size=size, channels=channels, **given)
    found = np.asarray(jax.jit(loaded.model.apply)(loaded.variables, images)[0])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    load.export(loaded.variables, name, tmp_path / "own.safetensors", card=loaded.card)
    again = load.load("", tmp_path / "own.safetensors", classes)  # with its channels and size by itself
    assert again.card == loaded.card
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    exported = timm.create_model(name, in_chans=channels, **options).eval()
    exported.load_state_dict(load_file(tmp_path / "own.safetensors"))


# Runs


def fit(tmp_path, name, **changes):
    source = write_scans(tmp_path / "scans", kind="tif", values=np.float32, labels=True)
    model = tl_jax.load("resnet8_cifar", "builtin:glyphs", channels=1, image_size=(16, 24))
    given = {"data.card": {"pixels": "float32", "scale": 1.0}, "data.augment": [("random_resized_crop", {})]}
    given |= {"resamples": 20, "log_every": (1.0, "steps"), **changes}
    return source, tl_jax.fit(
        model, source, workdir=tmp_path / name, epochs=4, batch_size=8, changes=given, verbose=False
    )


@pytest.mark.slow
def test_a_run_on_float_scans_of_one_channel_saves_what_reads_them_again(tmp_path):
    source, run = fit(tmp_path, "w")
    card = run.model.card
    assert (card.form, card.scale, card.input_size) == (Form("float32", 1), 1.0, (16, 24))
    audit = json.loads((run.folder / "audit.json").read_text())["phases"][0]
    stem = next(row for row in audit["parameters"] if "stem/conv" in row["path"])
    assert stem["origin"] == "conv1.weight (resampled from 3 to 1 channels)" and audit["card"]["pixels"] == "float32"
    files = sorted((tmp_path / "scans").glob("val_*.tif"))
    rows = run.predict(files)
    arrays = run.predict([np.asarray(Image.open(file)) for file in files])
    assert [row["probability"] for row in rows] == [row["probability"] for row in arrays]
    assert run.evaluate(source, "val")["roc_auc_macro"]["value"] == 1.0
    again = tl_jax.load("", run.folder / "model.safetensors")
    assert again.card == card and tl_jax.predict(again, files) == rows
    Image.new("L", (30, 30)).save(tmp_path / "photo.png")
    assert "pixels are uint8, expected float32" in run.predict([tmp_path / "photo.png"])[0]["error"]
    # A run that begins with its weights reads the same files without being told what they hold.
    config = {"data.card": {}, "data.override_card": False}
    second = tl_jax.fit(again, source, epochs=1, batch_size=8, changes={**config, "resamples": 20}, verbose=False)
    assert second.model.card.form == card.form


@pytest.mark.slow
def test_cached_features_of_scans_give_the_same_run(tmp_path):
    _, plain = fit(tmp_path, "plain", **{"data.augment": []})
    changes = {"cache": "features", "cache_dir": str(tmp_path / "cache"), "data.augment": []}
    _, cached = fit(tmp_path, "cached", **changes)
    for name in ("nll", "accuracy"):
        assert cached.metrics[name]["value"] == pytest.approx(plain.metrics[name]["value"], abs=1e-5)
