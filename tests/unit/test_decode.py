"""Every kind of image file gives the pixels it should, and a broken one is never handed out as half a picture."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from quietvit.data import decode
from quietvit.data.decode import UnreadableImage, decode_bytes, decode_file, is_image_name


def photo(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image: np.ndarray = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    return image


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}])
def test_jpeg_is_bit_equal_to_pillow(options: dict[str, Any]) -> None:
    data = encode(photo(), "JPEG", quality=90, **options)
    pixels = decode_bytes(data, "a")
    np.testing.assert_array_equal(pixels, pillow(data))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_grey_jpeg_has_three_equal_channels() -> None:
    data = encode(photo()[..., 1], "JPEG")
    np.testing.assert_array_equal(decode_bytes(data, "a"), pillow(data))


def test_rgb_jpeg_without_colour_transform() -> None:
    data = encode(photo(), "JPEG", keep_rgb=True, quality=95)
    assert np.abs(decode_bytes(data, "a").astype(int) - photo()).mean() < 3
    np.testing.assert_array_equal(decode_bytes(data, "a"), pillow(data))


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg_with_and_without_adobes_marker(adobe: bool) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[...] = (200, 20, 60, 30)
    data = encode(Image.frombytes("CMYK", (16, 16), inks.tobytes()), "JPEG", quality=100)
    start = data.index(b"Adobe") - 4
    assert data[start : start + 2] == b"\xff\xee"
    if not adobe:  # then the stored numbers (Pillow stores them inverted) are the inks themselves
        data = data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]
        inks = 255 - inks
    c, m, y, k = inks[0, 0].astype(float)
    wanted = np.array([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)])
    np.testing.assert_allclose(decode_bytes(data, "a")[8, 8], wanted, atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encode(photo(), kind, exif=exif.tobytes(), **options)
    plain = encode(photo(), kind, **options)
    upright = Image.open(io.BytesIO(plain)).convert("RGB")
    upright.getexif()[0x0112] = orientation
    pixels = decode_bytes(data, "a")
    np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(upright)))
    assert pixels.flags.c_contiguous


def test_motorola_and_cut_exif_blocks() -> None:
    plain = encode(photo(), "JPEG")
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = b"MM\0*" + struct.pack(">IH", 8, 1) + entry
    for block, turned in ((tiff, True), (tiff[:16], False), (b"XX" + tiff[2:], False)):
        body = b"Exif\0\0" + block
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
        assert decode_bytes(data, "a").shape == ((64, 48, 3) if turned else (48, 64, 3))


@pytest.mark.parametrize(("size", "min_side", "wanted"), [
    ((80, 96), None, (80, 96)),
    ((80, 96), 41, (80, 96)),
    ((80, 96), 40, (40, 48)),
    ((80, 96), 20, (20, 24)),
    ((80, 96), 1, (10, 12)),
    ((81, 97), 41, (41, 49)),  # half sizes are rounded up
    ((81, 97), 42, (81, 97)),
])  # fmt: skip
def test_reduced_decoding_keeps_the_shorter_side(
    size: tuple[int, int], min_side: int | None, wanted: tuple[int, int]
) -> None:
    data = encode(photo(*size), "JPEG", quality=95)
    pixels = decode_bytes(data, "a", min_side=min_side)
    assert pixels.shape[:2] == wanted
    image = Image.open(io.BytesIO(data))
    scale = round(size[0] / wanted[0])
    image.draft("RGB", (size[1] // scale, size[0] // scale))
    np.testing.assert_array_equal(pixels, np.asarray(image))


def test_reduced_decoding_of_a_turned_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_bytes(encode(photo(80, 96), "JPEG", exif=exif), "a", min_side=40).shape == (48, 40, 3)


def test_modes_of_grey_images() -> None:
    grey = photo()[..., 0]
    wanted = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(decode_bytes(encode(grey, "PNG"), "a"), wanted)
    bits = Image.fromarray(grey).point(lambda v: 255 * (v > 127)).convert("1")
    np.testing.assert_array_equal(decode_bytes(encode(bits, "PNG"), "a"), np.where(wanted > 127, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_depth(kind: str) -> None:
    values = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64) // 4  # a dark image stays dark
    pixels = decode_bytes(encode(values, kind), "a")
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], np.rint(values / 65535 * 255))


def test_16_bit_grey_in_other_containers() -> None:
    values = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    pgm = b"P5\n4 3\n65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_bytes(pgm, "a")[..., 0], np.rint(values / 65535 * 255))
    ints = encode(values.astype(np.int32), "TIFF")
    np.testing.assert_array_equal(decode_bytes(ints, "a")[..., 0], np.rint(values / 65535 * 255))


def test_16_bit_colour_png() -> None:
    image = photo(5, 7)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image.astype(np.uint16) * 257)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_bytes(data, "a"), image)


def test_integers_and_floats_without_a_known_range() -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    level = np.rint(ramp * 255)
    np.testing.assert_array_equal(
        decode_bytes(encode(ramp / 2, "TIFF"), "a")[..., 0], np.rint(ramp.astype(np.float64) / 2 * 255)
    )
    assert np.abs(decode_bytes(encode(ramp * 3000 - 5, "TIFF"), "a")[..., 0] - level).max() <= 1
    far = (ramp.astype(np.float64) * 2e6 - 1e6).astype(np.int32)
    assert np.abs(decode_bytes(encode(far, "TIFF"), "a")[..., 0] - level).max() <= 1
    with pytest.raises(UnreadableImage, match="undefined values"):
        decode_bytes(encode(np.full((2, 2), np.nan, np.float32), "TIFF"), "a")


def test_transparency_is_laid_on_white() -> None:
    rgba = np.dstack([photo(4, 4), np.array([0, 85, 170, 255], np.uint8)[None].repeat(4, 0)])
    alpha = rgba[..., 3:] / 255
    wanted = rgba[..., :3] * alpha + 255 * (1 - alpha)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        np.testing.assert_allclose(decode_bytes(encode(rgba, kind, **options), "a"), wanted, atol=1)
    la = rgba[..., [0, 3]]
    wanted = la[..., :1] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(decode_bytes(encode(la, "PNG"), "a"), wanted.repeat(3, 2), atol=1)


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    palette.putdata([0, 1, 2])
    colours = [[10, 20, 30], [200, 100, 50], [7, 8, 9]]
    for kind in ("PNG", "GIF"):
        assert decode_bytes(encode(palette, kind), "a")[0].tolist() == colours
        seen = decode_bytes(encode(palette, kind, transparency=1), "a")[0].tolist()
        assert seen == [colours[0], [255, 255, 255], colours[2]]


def test_transparent_colour_of_an_rgb_png() -> None:
    image = np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)
    data = encode(image, "PNG", transparency=(9, 9, 9))
    assert decode_bytes(data, "a").tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_bytes(data, "a")[0, 0].tolist() == [255, 0, 0]


# ---- broken files


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_cut_anywhere_is_unreadable(options: dict[str, Any]) -> None:
    thumbnail = encode(photo(16, 16), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0" + thumbnail  # an end marker of its own, inside the header
    data = encode(photo(), "JPEG", exif=exif, **options)
    assert data.count(b"\xff\xd9") == 2
    np.testing.assert_array_equal(decode_bytes(data, "a"), pillow(data))
    for cut in range(len(data)):
        with pytest.raises(UnreadableImage):
            decode_bytes(data[:cut], "a")


def test_a_jpeg_with_a_tail_of_zeros_is_unreadable() -> None:
    data = encode(photo(), "JPEG")
    for kept in (len(data) // 2, len(data) - 3):
        with pytest.raises(UnreadableImage, match="end marker"):
            decode_bytes(data[:kept] + bytes(len(data) - kept), "a")


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm() -> None:
    data = encode(photo(), "JPEG")
    np.testing.assert_array_equal(decode_bytes(data + b"\0\r\nrubbish", "a"), pillow(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_a_cut_file_is_unreadable_or_whole(kind: str) -> None:
    data = encode(photo(24, 32), kind)
    whole = decode_bytes(data, "a")
    num_unreadable = 0
    for cut in range(0, len(data), max(1, len(data) // 50)):
        try:
            np.testing.assert_array_equal(decode_bytes(data[:cut], "a"), whole)
        except UnreadableImage:
            num_unreadable += 1
    assert num_unreadable >= 40


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_unreadable_or_pixels(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]))
    content = bytearray(encode(photo(8, 8), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_bytes(bytes(content), "a", min_side=4)
    except UnreadableImage:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "empty"),
    (b"hello, I am a text", "not an image"),
    (b"\xff\xd8\xff\xd9", "no frame header"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would run Ghostscript
])  # fmt: skip
def test_what_is_no_image_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode_bytes(data, "some/name.jpg")
    assert caught.value.name == "some/name.jpg"
    assert str(caught.value).startswith("some/name.jpg: ")


def test_decompression_bombs_are_refused_before_decoding() -> None:
    jpeg = bytearray(encode(photo(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    png = bytearray(encode(photo(), "PNG"))
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    for data in (jpeg, png):
        with pytest.raises(UnreadableImage, match="bomb"):
            decode_bytes(bytes(data), "a")


def test_the_limit_on_pixels_is_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 48 * 64 - 1)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(UnreadableImage, match="refused as a bomb"):
            decode_bytes(encode(photo(), kind), "a")


def test_files_the_system_cannot_read(tmp_path: Any) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        decode_file(tmp_path / "gone.jpg", "gone.jpg")
    with pytest.raises(UnreadableImage, match="directory"):
        decode_file(tmp_path, "folder.jpg")


def test_names() -> None:
    assert all(is_image_name(name) for name in ("a.jpg", "a.JPEG", "b/c.d/e.Png", "x.tar.webp"))
    assert not any(is_image_name(name) for name in ("jpg", "a.txt", "a.jpg.bak", "a.jpg/b", ""))
