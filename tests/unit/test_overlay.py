"""The layers of changed pages."""

from incfs.overlay import Overlay, TableKey

LIVE = TableKey(1)


def test_later_layers_win() -> None:
    overlay = Overlay()
    overlay.change(LIVE, 0).update({1: (10, 0), 2: (20, 0)})
    overlay.freeze()
    overlay.change(LIVE, 0).update({2: (21, 0)})
    stored = {0: (5, 0), 1: (6, 0)}
    assert overlay.compose(LIVE, 0, stored) == {0: (5, 0), 1: (10, 0), 2: (21, 0)}
    assert stored == {0: (5, 0), 1: (6, 0)}
    overlay.thaw()
    assert overlay.compose(LIVE, 0, stored) == {0: (5, 0), 1: (6, 0), 2: (21, 0)}


def test_a_whole_page_hides_what_is_below() -> None:
    overlay = Overlay()
    overlay.change(LIVE, 0).update({1: (10, 0)})
    overlay.freeze()
    overlay.replace(LIVE, 0, {})
    assert overlay.hides(LIVE, 0)
    assert overlay.compose(LIVE, 0, {0: (5, 0)}) == {}
    overlay.change(LIVE, 0).update({3: (30, 0)})
    assert overlay.compose(LIVE, 0, {0: (5, 0)}) == {3: (30, 0)}
    assert sorted(overlay.pages(LIVE)) == [0, 0]
    assert overlay.page_count == 2


def test_tables_and_pages_are_apart() -> None:
    overlay = Overlay()
    overlay.change(TableKey(1, 2), 7).update({0: (10, 0)})
    assert overlay.compose(LIVE, 7, {}) == {}
    assert overlay.compose(TableKey(1, 2), 6, {}) == {}
    assert not overlay.hides(TableKey(1, 2), 7)
