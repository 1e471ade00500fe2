"""What every edit must do. To add one, subclass `EditTests`."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from types import MappingProxyType

import pytest
from builders import request

from auto_trans.core.edits import AddLora, Drop, Edit, Recipe, apply_edits
from auto_trans.errors import PlanError
from auto_trans.storage.sources import find_checkpoints

NAMES = [
    "model.layers.1.wq.weight",
    "model.layers.1.wq.mindpet_delta_lora_a",
    "model.layers.1.wq.mindpet_delta_lora_b",
    "adam_m.model.layers.1.wq.weight",
    "adam_m.model.layers.1.wq.mindpet_delta_lora_a",
    "model.layers.0.wq.weight",
    "global_step",
]


class EditTests(ABC):
    """Apply, compare, ship."""

    @abstractmethod
    def edits(self) -> list[Edit]:
        """Edits that differ, each in one parameter from the first."""

    def test_what_it_is_given_stays_as_it_is(self):
        recipes = apply_edits((), NAMES)
        before = dict(recipes)
        for edit in self.edits():
            made = edit.apply(MappingProxyType(recipes))
            assert made is not recipes
        assert recipes == before and list(recipes) == NAMES

    def test_it_makes_the_same_each_time(self):
        for edit in self.edits():
            assert edit.apply(apply_edits((), NAMES)) == edit.apply(apply_edits((), NAMES))

    def test_order_is_kept(self):
        for edit in self.edits():
            kept = list(edit.apply(apply_edits((), NAMES)))
            assert kept == [name for name in NAMES if name in kept]

    def test_recipes_name_what_the_source_holds(self):
        for edit in self.edits():
            for name, recipe in edit.apply(apply_edits((), NAMES)).items():
                assert name in NAMES and recipe.source in NAMES
                assert recipe.added is None or {recipe.added.a, recipe.added.b} <= set(NAMES)

    def test_each_parameter_tells_it_apart(self, tmp_path):
        """By its repr a conversion is known: without it one would be taken for another that is already done."""
        edits = self.edits()
        assert len({repr(edit) for edit in edits}) == len(edits) > 1
        (tmp_path / "x.ckpt").write_bytes(b"x")
        (found,) = find_checkpoints(tmp_path / "x.ckpt")
        digests = {request(tmp_path, tmp_path / "out", edits=(edit,)).digest(found) for edit in edits}
        assert len(digests | {request(tmp_path, tmp_path / "out").digest(found)}) == len(edits) + 1

    def test_it_can_be_shipped_and_compared(self):
        for edit in self.edits():
            copy = pickle.loads(pickle.dumps(edit))
            assert copy == edit and repr(copy) == repr(edit) and hash(copy) == hash(edit)

    def test_it_cannot_be_changed(self):
        for edit in self.edits():
            for name in vars(edit):
                with pytest.raises(AttributeError):
                    setattr(edit, name, None)


class TestDrop(EditTests):
    def edits(self):
        return [Drop(("adam_m.",)), Drop(("adam_v.",)), Drop(("adam_m.", "adam_v."))]

    def test_what_begins_so_is_left_out(self):
        kept = Drop(("adam_m.", "global")).apply(apply_edits((), NAMES))
        assert list(kept) == [name for name in NAMES if not name.startswith(("adam_m.", "global_step"))]
        assert list(Drop(()).apply(apply_edits((), NAMES))) == NAMES


class TestAddLora(EditTests):
    def edits(self):
        return [AddLora(1.0), AddLora(2.0), AddLora(1.0000000001)]

    def test_product_is_added_and_matrices_are_left_out(self):
        made = AddLora(2.0).apply(apply_edits((), NAMES))
        assert list(made) == [name for name in NAMES if "lora" not in name]
        added = made["model.layers.1.wq.weight"].added
        assert (added.a, added.b, added.scaling) == (NAMES[1], NAMES[2], 2.0)
        assert made["model.layers.0.wq.weight"] == Recipe("model.layers.0.wq.weight")

    @pytest.mark.parametrize(
        "missing, message",
        [
            (1, "has no partner A"),
            (2, "has no partner B"),
            (0, "belongs to model.layers.1.wq.weight, which is not there"),
        ],
    )
    def test_what_is_missing_is_named(self, missing, message):
        with pytest.raises(PlanError, match=message):
            AddLora(1.0).apply(apply_edits((), [name for i, name in enumerate(NAMES) if i != missing]))

    def test_source_without_lora_is_refused(self):
        with pytest.raises(PlanError, match="no LoRA parameters"):
            AddLora(1.0).apply(apply_edits((), [NAMES[0]]))


def test_edits_follow_each_other():
    made = apply_edits((AddLora(1.0), Drop(("adam_m.",))), NAMES)
    assert list(made) == ["model.layers.1.wq.weight", "model.layers.0.wq.weight", "global_step"]
    assert made["model.layers.1.wq.weight"].added is not None
    with pytest.raises(PlanError, match="no LoRA parameters"):
        apply_edits((Drop(("model.layers.1.wq.mindpet", "adam_m.")), AddLora(1.0)), NAMES)
