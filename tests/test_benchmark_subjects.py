# SPDX-License-Identifier: Apache-2.0
"""What post-training compression is measured on: readers, metrics and networks, on made-up data; nothing is fetched."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.reconstruct import data
from benchmarks.reconstruct.subjects import COSTS, SUBJECTS, Subject, cost, crepe, difference, lstm, resnet, silero
from sklearn.metrics import roc_auc_score
from torch import nn


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(data.FOLDER, str(tmp_path))
    return tmp_path


def test_a_package_that_is_there_is_not_fetched_and_one_that_cannot_be_says_how_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    (folder / "packages" / "freepats").mkdir(parents=True)
    assert data.deb("freepats") == folder / "packages" / "freepats"
    with pytest.raises(SystemExit, match=r"apt-get download other.*by hand"):
        data.deb("other")
    assert sorted(path.name for path in folder.iterdir()) == ["packages"]


def test_what_is_kept_is_made_once(folder: Path) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"half": torch.arange(6).view(2, 3).T}

    for _ in range(2):
        assert data.kept("numbers", make)["half"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert len(made) == 1


def _training(name: str, fail_at: int = -1, kind: type = torch.optim.AdamW) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), 0.01, **extra)

    def step(i: int) -> torch.Tensor:
        if i == fail_at:
            raise KeyboardInterrupt
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (i + 1)
        return model(torch.randn(8, 3, generator=torch.Generator().manual_seed(i))).square().mean()

    data.trained(name, model, optimizer, step, 30, every=10)
    return model


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_training_that_was_cut_off_ends_as_one_that_was_not(folder: Path, kind: type) -> None:
    whole = _training("whole", kind=kind).state_dict()
    with pytest.raises(KeyboardInterrupt):
        _training("cut", 25, kind)
    assert (folder / "cut.partial.safetensors").exists()
    for resumed in (_training("cut", 15, kind), _training("cut", 0, kind)):  # from step 20; and from the end
        for key, value in resumed.state_dict().items():
            assert torch.equal(value, whole[key]), key
    assert not (folder / "cut.partial.safetensors").exists()


def _patch(*recordings: tuple[np.ndarray, int, float]) -> bytes:
    """A Gravis patch as its makers describe it: file header, instrument, layer, and each recording behind its header."""
    file = struct.pack("<12s10s60sBBBHHI36x", b"GF1PATCH110", b"ID#000002", b"", 1, 14, 0, 1, 100, 0)
    instrument = struct.pack("<H16sIB40x", 0, b"", 0, 1)
    layer = struct.pack("<BBIB40x", 0, 0, 0, len(recordings))
    parts = [file, instrument, layer]
    for samples, rate, hertz in recordings:
        modes = {"int16": 1, "uint16": 3, "int8": 0, "uint8": 2}[samples.dtype.name]
        head = struct.pack("<7sBIIIHIIIHB", b"", 0, samples.nbytes, 0, 0, rate, 0, 0, round(1000 * hertz), 0, 7)
        parts += [head + bytes(18) + bytes([modes]) + bytes(40), samples.tobytes()]
    return b"".join(parts)


@pytest.mark.parametrize("kind", ["int16", "uint16", "int8", "uint8"])
def test_a_gravis_patch_is_read_as_it_was_written(kind: str) -> None:
    bits = np.iinfo(kind)
    silence = 0 if bits.min else (bits.max + 1) // 2
    first = np.array([bits.min, bits.max, silence, silence + 7], kind)
    found = list(crepe.recordings(_patch((first, 44_100, 440.0), (first[:2], 22_050, 27.5))))
    assert [(recording.rate, recording.hertz) for recording in found] == [(44_100, 440.0), (22_050, 27.5)]
    assert found[0].samples.tolist() == [int(x) - silence for x in first]
    assert len(found[1].samples) == 2


def test_the_pitch_of_a_bell_of_strengths_is_its_middle_also_at_the_rim() -> None:
    bins = torch.arange(crepe.BINS, dtype=torch.float64)
    strengths = torch.stack([torch.exp(-((bins - middle) ** 2) / 2) for middle in (150.0, 200.3, 0.0, 359.0)])
    heard = (crepe.pitch(strengths) - crepe.LOWEST) / crepe.CENTS_PER_BIN
    assert heard[:2].tolist() == pytest.approx([150.0, 200.3], abs=1e-2)
    rim = (strengths[2, :5] * bins[:5]).sum() / strengths[2, :5].sum()
    assert heard[2:].tolist() == pytest.approx([float(rim), 359 - float(rim)])


def test_crepe_has_the_size_that_its_authors_give() -> None:
    tiny = crepe.Crepe(4)
    assert sum(p.numel() for p in tiny.parameters()) == 486_552
    assert tiny(torch.randn(2, crepe.FRAME)).shape == (2, crepe.BINS)


def test_silero_hears_no_chunk_before_it_is_spoken() -> None:
    torch.manual_seed(0)
    model = silero.Silero().eval()
    nn.init.normal_(model.basis)
    sound = torch.randn(2, 5 * silero.CHUNK)
    later = sound.clone()
    later[:, 3 * silero.CHUNK :] += 1
    with torch.no_grad():
        heard, changed = model(sound), model(later)
        alone = model(sound[:1])
    assert heard.shape == (2, 5)
    assert torch.equal(heard[:, :3], changed[:, :3]) and not torch.equal(heard[:, 3], changed[:, 3])
    torch.testing.assert_close(alone, heard[:1])
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 309_633


def test_the_area_under_the_roc_curve_is_scikit_learns_ties_and_all() -> None:
    chance = np.random.default_rng(0)
    rows = np.stack([chance.integers(9, size=(20, 30)) / 9, chance.integers(2, size=(20, 30))], 2)
    assert silero.area(rows) == pytest.approx(roc_auc_score(rows[..., 1].ravel(), rows[..., 0].ravel()))


def test_a_clip_is_speech_where_a_prompt_was_put_and_has_a_noise_floor_everywhere() -> None:
    chance = np.random.default_rng(0)
    sound, speech = silero._clip([np.sin(np.arange(silero.RATE))], chance)
    power = np.square(sound).reshape(silero.CHUNKS, silero.CHUNK).mean(1)
    assert 0.2 < speech.mean() < 0.8
    noise = np.median(power[~speech])
    assert np.median(power[speech]) == pytest.approx(0.5 + noise, rel=0.1)
    assert 0 < 10 * np.log10(0.5 / noise) < 25  # pauses are quieter than the whole noise where it is coloured


def _subject(rows: np.ndarray) -> Subject:
    return Subject("made up", nn.Identity(), [], (), "mean", len(rows), lambda model: rows)


def test_a_paired_difference_has_the_textbooks_interval() -> None:
    chance = np.random.default_rng(0)
    dense = chance.standard_normal((4000, 1)) * 10
    other = dense + 0.5 + chance.standard_normal((4000, 1))
    found = difference(_subject(dense), dense, other)
    assert found["low"] < 0.5 < found["high"] and found["n"] == 4000
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.1)
    with pytest.raises(ValueError, match="same samples"):
        difference(_subject(dense), dense, other[1:])


@pytest.mark.parametrize(
    ("model", "inputs", "outputs", "parameters"),
    [
        (resnet.network(), (2, 1, 28, 28), (2, 10), 696_042),
        (cost.resnet50_network(), (1, 3, 64, 64), (1, 1000), 25_557_032),
    ],
)
def test_residual_networks_have_their_size_and_shape(
    model: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...], parameters: int
) -> None:
    with torch.no_grad():
        assert model.eval()(torch.randn(inputs)).shape == outputs
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_language_model_answers_each_token() -> None:
    assert lstm.LanguageModel(50, 8)(torch.randint(50, (3, 7))).shape == (3, 7, 50)


def test_the_block_is_llamas() -> None:
    """Held against transformers: rotary positions, grouped queries, norms, mask."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    theirs = llama.LlamaDecoderLayer(config, 0).eval()
    ours = cost.LlamaBlock(64, 96, 8, 2)
    renamed = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    weights = {key.removeprefix("self_attn.").removeprefix("mlp."): value for key, value in theirs.state_dict().items()}
    for theirs_, mine in renamed.items():
        weights[f"{mine}.weight"] = torch.rand_like(weights.pop(f"{theirs_}.weight"))
        theirs.get_submodule(theirs_).weight.data.copy_(weights[f"{mine}.weight"])
    ours.load_state_dict(weights)
    x = torch.randn(2, 9, 64)
    turned = llama.LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    with torch.no_grad():
        expected = theirs(x, position_embeddings=turned, attention_mask=None)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(ours(x), expected)


def test_subjects_are_registered_by_the_names_that_the_readme_gives() -> None:
    readme = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text()
    for name in (*SUBJECTS, *COSTS):
        assert f"`{name}`" in readme
