# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib.metadata
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from featherweight import recipe
from featherweight.distill import CIRKD, CWD, KL, Attention, Distill, Features
from featherweight.errors import RecipeError
from featherweight.recipe import load_recipe, method_names, to_dict, to_toml
from featherweight.train import Train

GOOD = """# a comment with stages = 3
seed = 4

[[stages]]
method = "train"
steps = 30
schedule = "linear"  # lr = 5

[[stages]]
method = "factorize"
rank = 3
layers = ["fc*"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.toml"
    path.write_text(text)
    return path


def test_a_recipe_is_what_python_would_say(tmp_path: Path) -> None:
    read = load_recipe(write(tmp_path, GOOD))
    assert read.seed == 4
    assert read.stages[0] == Train(steps=30, schedule="linear")
    assert dataclasses.asdict(read.stages[1]) == {"rank": 3, "layers": ("fc*",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace("schedule =", "shedule ="),
            r"r.toml, line 7: method 'train' has no key 'shedule'; did you mean 'schedule'",
        ),
        (GOOD.replace('"factorize"', '"factorise"'), r"r.toml, line 10: no method 'factorise'. Nearest: factorize"),
        (GOOD.replace("rank = 3", "rank = 0"), r"r.toml, line 11: factorize: rank must be"),
        (GOOD.replace("steps = 30", ""), r"line 5: train: give steps or epochs"),
        (GOOD.replace("rank = 3", ""), r"line 10: .*missing.*rank"),
        (GOOD.replace("seed = 4", "sead = 4"), r"line 2: a recipe has no key 'sead'; did you mean 'seed'"),
        (GOOD.replace("seed = 4", 'seed = "4"'), r"line 2: seed must be a whole number"),
        ("seed = 1", r"at least one table \[\[stages\]\]"),
        ("[[stages]]\nsteps = 3", r"line 1: .*a key method"),
        ("[[stages]\n", r"r.toml: "),
        (
            '[[stages]]\nmethod = "train"\nsteps = 9\nhooks = [{ method = "train", stepz = 1 }]',
            r"line 4: method 'train' has no key 'stepz'; did you mean 'steps'",
        ),
    ],
)
def test_a_wrong_recipe_is_answered_with_file_line_key_and_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.toml could not be read"):
        load_recipe(tmp_path / "gone.toml")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    stages = (Train(steps=3, lr=0.5, clip=1.0), Train(epochs=2, optimizer="sgd", evaluate_every=7))
    text = to_toml(stages, seed=9)
    tomllib.loads(text)
    again = load_recipe(write(tmp_path, text))
    assert again == recipe.Recipe(stages, 9)


DISTILLED = """[[stages]]
method = "train"
steps = 30
distill = { kl = { temperature = 2.0 }, features = { layers = { layer3 = "stages.2" } } }
"""


def test_losses_are_named_with_their_options(tmp_path: Path) -> None:
    wanted = Train(steps=30, distill=[KL(temperature=2.0), Features({"layer3": "stages.2"})])
    assert load_recipe(write(tmp_path, DISTILLED)).stages == (wanted,)
    tables = (
        DISTILLED.partition("distill")[0] + "[stages.distill.kl]\ntemperature = 2.0\n[stages.distill.features.layers]\n"
    )
    assert load_recipe(write(tmp_path, tables + 'layer3 = "stages.2"\n')).stages == (wanted,)
    listed = (
        'distill = [{ method = "kl", temperature = 2.0 }, { method = "features", layers = { layer3 = "stages.2" } }]'
    )
    assert load_recipe(write(tmp_path, DISTILLED.partition("distill")[0] + listed)).stages == (wanted,)
    named = DISTILLED.partition("distill")[0] + "hooks = { gradual_pruning = { sparsity = 0.5, end = 20 } }"
    assert load_recipe(write(tmp_path, named)).stages[0].hooks[0].sparsity == 0.5


@pytest.mark.parametrize(
    "distill",
    [
        KL(temperature=2.0),
        [CWD(layers=["a", "b"], weight=50.0), KL(axis=-1)],
        [Features({"a": "b"}, kind="cosine"), Attention("*.attn", kind="rows"), CIRKD("x", classes=19, project=True)],
        Distill([KL(), CWD()]),
    ],
)
def test_distillation_is_read_back_as_it_was_written(tmp_path: Path, distill: Any) -> None:
    stages = (Train(steps=3, distill=distill),)
    json.dumps(to_dict(stages[0]), allow_nan=False)
    assert load_recipe(write(tmp_path, to_toml(stages, seed=9))).stages[0] == stages[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DISTILLED.replace("kl =", "kll ="), r"line 4: no loss to distill by 'kll'. Nearest: kl"),
        (
            DISTILLED.replace("temperature", "temprature"),
            r"line 4: method 'kl' has no key 'temprature'; did you mean 'temp",
        ),
        (DISTILLED.replace("2.0", "0.0"), r"line 4: KL: temperature must be a number above 0"),
        (
            DISTILLED.replace("{ temperature = 2.0 }", "2.0"),
            r"line 4: distill maps names to tables.*kl = {}.*got kl = 2.0",
        ),
        (DISTILLED.replace("kl =", "train ="), r"line 4: no loss to distill by 'train'"),
    ],
)
def test_a_wrong_loss_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_functions_are_named_not_stored() -> None:
    def mine(parameters: Any) -> Any:
        return None

    entry = to_dict(Train(steps=3, optimizer=mine))
    assert entry["optimizer"].startswith("<tests.test_recipe.")
    tomllib.loads(to_toml([Train(steps=3, optimizer=mine)]))


@dataclasses.dataclass(frozen=True)
class ThirdParty:
    """A method as another package would bring it."""

    amount: float = 0.5


def test_third_parties_add_methods_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("anything", "tests.test_recipe:ThirdParty", "featherweight.methods")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == "featherweight.methods" else []
    )
    assert method_names()["third_party"] == "tests.test_recipe:ThirdParty"
    read = load_recipe(write(tmp_path, '[[stages]]\nmethod = "third_party"\namount = 0.25\n'))
    assert read.stages == (ThirdParty(0.25),)


def test_every_installed_method_can_be_imported() -> None:
    assert {"train", "factorize", "gradual_pruning"} <= set(recipe.methods())
