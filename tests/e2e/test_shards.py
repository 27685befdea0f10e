"""From shards to a subset with the bundled model, on a real local Ray."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import shard_files
from support.runs import run, stats

from d2filter.algorithm.scores import registry as scores
from d2filter.cli.main import main
from d2filter.formats import shardlist
from d2filter.formats import uid as uid_format

pytestmark = pytest.mark.usefixtures("cluster")


def bomb() -> bytes:
    """A small PNG that claims 60,000 × 60,000 pixels."""
    content = bytearray(shard_files.black_png_with_alpha())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """Two shards of 150 samples, some of them broken, embedded and filtered."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        files = []
        for i in range(70):
            files += shard_files.members(f"{number}{i:04d}", 100 * number + i)
        files += [
            (f"{number}a.jpg", shard_files.picture(1)[:200]), (f"{number}a.txt", b"cut off"),
            (f"{number}b.png", bomb()), (f"{number}b.txt", b"a bomb"),
            (f"{number}c.txt", b"nothing to see"),
            (f"{number}d.png", shard_files.black_png_with_alpha()), (f"{number}d.txt", b"alpha"),
            (f"{number}e.png", shard_files.picture(5, "PNG", "P")), (f"{number}e.txt", b"palette"),
            (f"{number}f.webp", shard_files.picture(6, "WEBP")),
            (f"{number}f.txt", "été 雪".encode()),
            (f"{number}g.png", shard_files.picture(7, "PNG", "LA")),
            (f"{number}g.txt", b"gray alpha"),
            (f"{number}h.jpg", shard_files.picture(8, "JPEG", "CMYK")), (f"{number}h.txt", b"cmyk"),
            (f"{number}i.jpg", shard_files.picture(9)), (f"{number}i.txt", b"word " * 500),
        ]  # fmt: skip
        shard_files.write(folder / f"s/{number:05d}.tar", files)
    words = ("--shards", folder / "s", "--fraction", "0.5", "--batch-size", 32)
    assert run("run", *words, "--max-bad", "0.1", "--out-dir", folder / "o") == 0
    return folder


def test_everything_is_accounted_for(finished: Path) -> None:
    out = finished / "o"
    samples = stats(out)["samples"]
    # the pictures d to i are the same in both shards, so are their content ids
    assert samples == {
        "read": 158, "ranked": 146, "bad": 6, "duplicate": 6, "kept": 73, "pruned": 73
    }  # fmt: skip
    bad = pq.read_table(out / "bad_samples.parquet").to_pylist()
    assert sorted((b["stage"], b["reason"], b["key"]) for b in bad if b["status"] == "bad") == [
        ("embed", "broken image", "0a"), ("embed", "broken image", "1a"),
        ("embed", "no image", "0c"), ("embed", "no image", "1c"),
        ("embed", "too many pixels", "0b"), ("embed", "too many pixels", "1b"),
    ]  # fmt: skip
    messages = {b["key"]: b["message"] for b in bad}
    assert "DecompressionBomb" in messages["0b"]
    assert run("verify", out) == 0


def test_rereading_shards_finds_content_that_changed_under_the_same_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished / "o"
    shard = finished / "s/00001.tar"
    whole, times = shard.read_bytes(), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)

    def breaches(content: bytes) -> list[str]:
        shard.write_bytes(content)
        os.utime(shard, ns=times)
        capsys.readouterr()
        main(["verify", str(out), "--deep"])
        shard.write_bytes(whole)
        os.utime(shard, ns=times)
        lines = capsys.readouterr().out.splitlines()
        return [line.strip() for line in lines if not line.startswith("ok ")]

    assert breaches(whole) == []
    # size and time stay as they were: a caption, then a header is another
    at = whole.index("été 雪".encode())
    title, said = breaches(whole[:at] + b"E" + whole[at + 1 :])
    assert "shards hold the samples that were embedded or reported" in title
    assert said.endswith("00001.tar: sample 1f was not read like this")
    at = whole.index(b"1i.jpg")
    assert "00001.tar" in breaches(whole[:at] + b"\xaa" * 300 + whole[at + 300 :])[1]


def test_the_metadata_is_datacomps(finished: Path) -> None:
    metadata = finished / "o/metadata"
    assert sorted(p.name for p in metadata.iterdir()) == [
        "00000.npz", "00000.parquet", "00001.npz", "00001.parquet"
    ]  # fmt: skip
    table = pq.read_table(metadata / "00000.parquet").to_pydict()
    with np.load(metadata / "00000.npz", allow_pickle=False) as arrays:
        image, text = arrays["tiny_img"], arrays["tiny_txt"]
    assert image.dtype == text.dtype == np.float16
    assert len(table["uid"]) == len(image) == len(text) == 76
    assert np.allclose(np.linalg.norm(image.astype(float), axis=1), 1, atol=1e-3)
    assert table["clip_tiny_similarity_score"] == scores.clip_score(image, text).tolist()
    assert table["key"][:2] == ["00000", "00001"]
    assert set(table["shard"]) == {str(finished / "s/00000.tar")}
    assert (table["original_width"][0], table["original_height"][0]) == (64, 64)


def test_embeddings_are_those_of_open_clip_itself(finished: Path) -> None:
    """The same pictures and captions through open_clip by hand."""
    import open_clip
    import torch

    from d2filter.models import tiny

    tiny.register()
    model, _, transform = open_clip.create_model_and_transforms(
        tiny.MODEL_NAME, pretrained=str(tiny.WEIGHTS)
    )
    model.eval()
    tokenize = open_clip.get_tokenizer(tiny.MODEL_NAME)
    pictures = [Image.open(io.BytesIO(shard_files.picture(i))) for i in range(20)]
    with torch.inference_mode():
        image = model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
        text = model.encode_text(
            tokenize([shard_files.caption(i) for i in range(20)]), normalize=True
        )
    with np.load(finished / "o/metadata/00000.npz") as arrays:
        assert np.abs(arrays["tiny_img"][:20] - image.numpy()).max() < 2e-3
        assert np.abs(arrays["tiny_txt"][:20] - text.numpy()).max() < 2e-3


def test_matched_pairs_score_higher_than_the_odd_ones(finished: Path) -> None:
    table = pq.read_table(finished / "o/metadata/00000.parquet").to_pydict()
    score = np.array(table["clip_tiny_similarity_score"])
    drawn = np.array([len(key) == 5 for key in table["key"]])
    assert np.median(score[drawn]) > 0.7 > np.median(score[~drawn])


def test_kept_lists_name_shards_and_keys(finished: Path) -> None:
    kept = pq.read_table(finished / "o/kept/part-00000.parquet").to_pylist()
    assert len(kept) == 73
    by_uid = {}
    for name in ("00000", "00001"):
        table = pq.read_table(finished / f"o/metadata/{name}.parquet").to_pydict()
        for uid, key, shard in zip(table["uid"], table["key"], table["shard"], strict=True):
            by_uid.setdefault(uid, set()).add((key, shard))
    assert all((k["key"], k["shard"]) in by_uid[k["uid"]] for k in kept)
    subset = np.load(finished / "o/subset.npy")
    assert sorted(k["uid"] for k in kept) == uid_format.to_hex(subset["f0"], subset["f1"])
    sizes = json.loads((finished / "o/kept/sizes.json").read_text())
    assert set(sizes) == {"00000.tar", "00001.tar"}
    assert sum(sizes.values()) == 73


def test_embed_and_graph_run_alone(finished: Path, tmp_path: Path) -> None:
    shards = str(finished / "s/{00000..00001}.tar")
    out = tmp_path / "o"
    words = ("--max-bad", "0.1", "--out-dir", out)
    assert run("embed", "--shards", shards, "--batch-size", 32, *words) == 0
    assert stats(out)["samples"]["bad"] == 6
    assert run("graph", "--arch", "tiny", *words) == 0
    assert stats(out)["samples"] == {
        **stats(finished / "o")["samples"], "kept": 0, "pruned": 0
    }  # fmt: skip
    # alone, it cannot know what will be selected
    assert run("rank", "--out-dir", out, "--tuned-for", "0.5") == 0
    assert run("select", "--out-dir", out, "--fraction", "0.5") == 0
    assert (out / "subset.npy").read_bytes() == (finished / "o/subset.npy").read_bytes()


def test_a_truncated_shard_is_reported_after_everything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f for i in range(30) for f in shard_files.members(f"{i:03d}", i)]
    path = shard_files.write(tmp_path / "s/00000.tar", files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shard_files.write(
        tmp_path / "s/00001.tar", [f for i in range(9) for f in shard_files.members(f"{i}", 50 + i)]
    )
    (tmp_path / "s/00002.tar").write_bytes(b"this is no tar file" * 100)
    out = tmp_path / "o"
    assert run("run", "--shards", tmp_path / "s", "--max-bad", "0.5", "--out-dir", out) == 3
    error = capsys.readouterr().err
    assert "2 shards could not be read whole" in error
    assert len(stats(out)["lost_shards"]) == 2
    samples = stats(out)["samples"]
    assert 20 < samples["read"] < 35
    assert samples["kept"] > 5
    # the same command again: nothing to do, and still not silent
    assert run("run", "--shards", tmp_path / "s", "--max-bad", "0.5", "--out-dir", out) == 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "ViT-L-14"], 2, "add --pretrained"),
        (["--model", "no-such-model", "--pretrained", "x"], 1, "has no model 'no-such-model'"),
        (["--model", "ViT-B-32", "--pretrained", "/none.pt"], 1, "cannot be loaded"),
        (["--precision", "fp8"], 2, "precision is 'fp8', allowed are fp32"),
        (["--batch-size", "0"], 2, "batch-size is 0"),
        (["--max-pixels", "0"], 2, "max-pixels is 0"),
        (["--alpha", "gray"], 2, "--alpha"),
        (["--metadata-dir", "x"], 2, "shards and metadata-dir are both given"),
    ],
)
def test_unusable_models_and_options_are_refused(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    capsys.readouterr()
    arguments = ("--shards", finished / "s", "--out-dir", tmp_path / "o", *words)
    assert run("run", *arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "o/metadata").exists()


def test_unusual_names_shapes_and_depths_do_not_lose_the_shard(tmp_path: Path) -> None:
    """None of these may cost the shard; a 16-bit gray picture is the 8-bit one."""
    gray = Image.open(io.BytesIO(shard_files.picture(3))).convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    files = [
        *shard_files.members("a", 1),
        ("b\udcff.jpg", shard_files.picture(2)), ("b\udcff.txt", b"name that is no text"),
        ("c.jpg", shard_files.picture(3)), ("c.json", b'{"caption": "c", "url": "http://x/\\udc80"}'),
        ("d.png", shard_files.png(Image.new("L", (1, 60000)))), ("d.txt", b"a line"),
        ("e.png", shard_files.png(gray)), ("e.txt", b"gray"),
        ("f.png", shard_files.png(deep)), ("f.txt", b"gray"),
        ("g.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("g.txt", b"PostScript"),
    ]  # fmt: skip
    shard_files.write(tmp_path / "s/0.tar", files)
    out = tmp_path / "o"
    assert run("embed", "--shards", tmp_path / "s", "--max-bad", "1", "--out-dir", out) == 0
    bad = pq.read_table(out / "bad_samples.parquet").to_pylist()
    assert [(b["key"], b["reason"]) for b in bad] == [("d", "broken image"), ("g", "unread format")]
    table = pq.read_table(out / "metadata/0.parquet").to_pydict()
    assert table["key"] == ["a", "b\\udcff", "c", "e", "f"]
    with np.load(out / "metadata/0.npz") as arrays:
        image = arrays["tiny_img"].astype(float)
    assert image[3] @ image[4] > 0.999


def test_changed_added_and_removed_shards_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shard changed, one new, one gone: as a run that never knew the others."""
    for number in range(4):
        files = [f for i in range(6) for f in shard_files.members(f"{i}", 10 * number + i)]
        shard_files.write(tmp_path / f"s/{number}.tar", files)
    out = tmp_path / "o"
    words = ("run", "--shards", tmp_path / "s", "--fraction", "0.5", "--out-dir", out)
    assert run(*words) == 0
    shard_files.write(
        tmp_path / "s/1.tar", [f for i in range(3) for f in shard_files.members(f"{i}", 70 + i)]
    )
    (tmp_path / "s/2.tar").unlink()
    shard_files.write(
        tmp_path / "s/4.tar", [f for i in range(5) for f in shard_files.members(f"{i}", 90 + i)]
    )
    capsys.readouterr()
    assert run(*words) == 1
    assert "input file 1 has changed" in capsys.readouterr().err
    assert run(*words, "--overwrite", "embed") == 0
    after = sorted(p.name for p in (out / "metadata").iterdir())
    assert after == [f"{n}.{suffix}" for n in (0, 1, 3, 4) for suffix in ("npz", "parquet")]
    assert stats(out)["samples"]["read"] == 6 + 3 + 6 + 5
    assert run("verify", out) == 0
    fresh = tmp_path / "fresh"
    assert run(*words[:-1], fresh) == 0
    assert (fresh / "subset.npy").read_bytes() == (out / "subset.npy").read_bytes()
    # what was removed, or never arrived whole, is made again
    (out / "metadata/0.npz").unlink()
    (out / "metadata/3.parquet").write_bytes(b"half")
    assert run(*words, "--overwrite", "embed") == 0
    assert run("verify", out) == 0
    assert (fresh / "subset.npy").read_bytes() == (out / "subset.npy").read_bytes()
    # a shard that lost all its samples leaves no embeddings of its earlier self
    (tmp_path / "s/4.tar").write_bytes(b"no tar" * 300)
    assert run(*words, "--overwrite", "embed") == 3
    assert not (out / "metadata/4.npz").exists()
    assert stats(out)["samples"]["read"] == 6 + 3 + 6
    assert run("verify", out) == 0


def test_shards_whose_names_collide_lose_nothing(tmp_path: Path) -> None:
    """One base name in two folders, one in another case, one spelled like a mark, one too long."""
    marked = shardlist.unique_names([str(tmp_path / f"s/{f}/0.tar") for f in "ab"])[0]
    names = ["a/0.tar", "b/0.tar", f"c/{marked}.tar", f"d/{marked.upper()}.TAR"]
    names += ["a/x.tar", "a/X.tar", "a/tasks.tar", f"a/{'n' * 240}.tar", f"b/{'n' * 240}.tar"]
    for number, name in enumerate(names):
        files = [f for i in range(3) for f in shard_files.members(f"{i}", 900 + 10 * number + i)]
        shard_files.write(tmp_path / "s" / name, files)
    out = tmp_path / "o"
    words = ("run", "--shards", *(tmp_path / "s" / f for f in "abcd"), "--out-dir", out)
    assert run(*words) == 0
    tables = [pq.read_table(p).to_pydict() for p in (out / "metadata").glob("*.parquet")]
    assert len(tables) == len(names)
    assert {t["shard"][0] for t in tables} == {str(tmp_path / "s" / name) for name in names}
    assert len({uid for t in tables for uid in t["uid"]}) == 3 * len(names)
    assert run("verify", out, "--deep") == 0
    assert run(*words) == 0


def test_the_background_of_transparent_pictures_is_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another choice changes the fingerprint of embed."""
    drawn = Image.open(io.BytesIO(shard_files.picture(3))).convert("RGBA")
    drawn.paste((0, 0, 0, 0), (0, 0, 64, 40))
    files = [
        ("a.png", shard_files.png(drawn)),
        ("a.txt", b"a red star"),
        *shard_files.members("b", 5),
    ]
    files += [("c.png", shard_files.black_png_with_alpha()), ("c.txt", b"nothing")]
    shard_files.write(tmp_path / "s/0.tar", files)
    rows = {}
    for alpha in ("drop", "black", "white"):
        out = tmp_path / alpha
        words = ("embed", "--shards", tmp_path / "s", "--alpha", alpha, "--out-dir", out)
        assert run(*words) == 0
        with np.load(out / "metadata/0.npz") as arrays:
            rows[alpha] = arrays["tiny_img"].astype(np.float64)
        figures = json.loads((out / "completions/embed.json").read_text())["stats"]
        assert (figures["alpha"], figures["one_color"]) == (2, 1)
    assert (rows["drop"][:2] == rows["black"][:2]).all()
    assert rows["white"][0] @ rows["black"][0] < 0.95
    assert (rows["white"][1] == rows["black"][1]).all()
    capsys.readouterr()
    assert run(*words[:-4], "--alpha", "drop", "--out-dir", tmp_path / "white") == 1
    assert "alpha" in capsys.readouterr().err


def test_other_weights_at_the_same_path_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from d2filter.models import tiny

    weights = tmp_path / "w.safetensors"
    weights.write_bytes(tiny.WEIGHTS.read_bytes())
    shard_files.write(tmp_path / "s/0.tar", shard_files.members("a", 1))
    words = (
        "embed",
        "--shards",
        tmp_path / "s",
        "--pretrained",
        weights,
        "--out-dir",
        tmp_path / "o",
    )
    assert run(*words) == 0
    assert run(*words) == 0
    weights.write_bytes(tiny.WEIGHTS.read_bytes())
    os.utime(weights, (1, 1))
    capsys.readouterr()
    assert run(*words) == 1
    assert "weights was" in capsys.readouterr().err


def test_shards_without_a_usable_sample_fail_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_files.write(tmp_path / "s/0.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    assert run("run", "--shards", tmp_path / "s", "--out-dir", tmp_path / "o") == 1
    assert "none of 2 samples in 1 shards can be embedded (2 no image)" in capsys.readouterr().err
