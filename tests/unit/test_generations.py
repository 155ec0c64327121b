"""A volume's snapshots against the obvious implementation."""

from hypothesis import given
from hypothesis import strategies as st

from incfs.generations import Generations
from incfs.model import Generation, Snapshot, VolumeId

CHANGES = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["a", "b", "uuid:u3", "", None])), max_size=30)


def snapshot(generation: int, name: str) -> Snapshot:
    return Snapshot(VolumeId(1), Generation(generation), f"u{generation}", name, 0, 0, 0)


@given(CHANGES)
def test_same_answers_as_a_search_through_all(changes: list[tuple[int, str | None]]) -> None:
    found: Generations[Snapshot] = Generations()
    model: dict[int, str] = {}
    for generation, name in changes:
        if name and name in model.values() and model.get(generation) != name:
            continue  # names are unique
        if name is None:
            found.drop(Generation(generation))
            model.pop(generation, None)
        else:
            found.put(snapshot(generation, name))
            model[generation] = name
    existing = sorted(model)
    assert [s.generation for s in found.listed(removed=True)] == existing
    assert [s.generation for s in found.listed(removed=False)] == [g for g in existing if model[g]]
    assert found.newest == max(existing, default=0)
    assert found.removed == [g for g in existing if not model[g]]
    for generation in range(8):
        assert found.since(Generation(generation)) == [g for g in existing if g >= generation]
        assert found.newest_named(Generation(generation)) == max(
            (g for g in existing if g <= generation and model[g]), default=0
        )
        assert found.before(Generation(generation)) == max((g for g in existing if g < generation), default=0)
        hit = found.get(Generation(generation))
        assert (hit.name if hit else None) == model.get(generation)
        by_uuid = found.named(f"uuid:u{generation}")
        named_so = [g for g in existing if model[g] == f"uuid:u{generation}"]
        expected = named_so or [g for g in existing if g == generation and model[g]]
        assert ([by_uuid.generation] if by_uuid else []) == expected
    for name in ("a", "b"):
        by_name = found.named(name)
        assert (by_name.generation if by_name else None) == next((g for g in existing if model[g] == name), None)
