"""Marks, trends and events."""

from itertools import count
from pathlib import Path

from incfs.events import KEPT_EVENTS, MAX_FILE_BYTES, EventLog
from incfs.model import Storage, StorageId
from incfs.monitor import HostRoom, Monitor, Trend
from incfs.placement import Room, choose_columns, order_rooms, parse_rule, parse_rules, replace_low


def room(number: int, free: int, *, low: int = 100, used: int = 0, kind: str = "", usable: bool = True) -> Room:
    storage = Storage(StorageId(number), f"uuid{number}", f"image{number}", 1000, 0, storage_class=kind)
    return Room(storage, used, free, low, usable)


def ids(rooms: list[Room]) -> list[int]:
    return [found.storage.id for found in rooms]


def test_a_mark_is_told_once_and_again_only_after_it_was_left_behind() -> None:
    monitor = Monitor()
    told = [[n.kind for n in monitor.observe(0.0, [room(1, free)], [])] for free in (200, 99, 50, 110, 99, 125, 99)]
    assert told == [[], ["low-water"], [], [], [], ["low-water-over"], ["low-water"]]


def test_host_filesystems_have_marks_of_their_own() -> None:
    host = HostRoom(1, "/disk", free_bytes=10, total_bytes=1000, low_water_bytes=100, reserve_bytes=20)
    notices = Monitor().observe(0.0, [], [host])
    assert [n.kind for n in notices] == ["host-low-water", "host-reserve"]
    assert all("/disk" in n.subject for n in notices)


def test_the_time_to_full_follows_from_the_last_hour() -> None:
    trend = Trend()
    assert trend.seconds_to_fill(1000) is None
    for minute in range(121):
        trend.add(minute * 60.0, 0 if minute < 60 else (minute - 60) * 60)
    assert trend.seconds_to_fill(1000) == 1000.0
    shrinking = Trend()
    for second in (0.0, 200.0):
        shrinking.add(second, int(1000 - second))
    assert shrinking.seconds_to_fill(1000) is None


def test_what_is_at_low_water_comes_last() -> None:
    rooms = [room(1, 50), room(2, 500), room(3, 900, usable=False), room(4, 120)]
    assert ids(order_rooms(rooms, ())) == [2, 4, 1]
    assert ids(order_rooms(rooms, (), StorageId(4))) == [4, 2, 1]
    assert ids(order_rooms(rooms, (), StorageId(1))) == [2, 4, 1]


def test_rules_must_all_be_met() -> None:
    rooms = [room(1, 500, kind="ssd"), room(2, 500, kind="hdd"), room(3, 500, kind="ssd")]
    assert ids(order_rooms(rooms, parse_rules(["class=ssd"]))) == [1, 3]
    assert ids(order_rooms(rooms, parse_rules(["class=ssd", "id!=1"]))) == [3]
    assert parse_rule("redundancy = raid6").value == "raid6"


def test_columns_are_those_with_most_room_and_low_ones_are_replaced() -> None:
    rooms = [room(1, 50), room(2, 500), room(3, 900)]
    assert choose_columns(rooms, 2) == (2, 3)
    assert choose_columns(rooms, 5) == (1, 2, 3)
    assert replace_low((StorageId(1), StorageId(2)), rooms) == (3, 2)
    assert replace_low((StorageId(1), StorageId(2)), rooms[:2]) == (1, 2)


def test_events_are_found_again_and_numbered_on(tmp_path: Path) -> None:
    log = EventLog(tmp_path, count(1_000_000_000).__next__)
    log.record("low-water", "storage 1", "10 B free", free_bytes=10)
    log.flush()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"number": 7, "ti')
    log = EventLog(tmp_path, count(2_000_000_000).__next__)
    assert log.record("full", "pool", "no room").number == 2
    assert [(e.kind, e.facts) for e in log.since()] == [("low-water", {"free_bytes": 10}), ("full", {})]
    assert [e.kind for e in log.since(1)] == ["full"]


def test_the_event_files_are_bounded(tmp_path: Path) -> None:
    log = EventLog(tmp_path, count().__next__)
    for _ in range(60):
        log.record("noise", "pool", "x" * (MAX_FILE_BYTES // 20))
        log.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "events.jsonl.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2.2 * MAX_FILE_BYTES
    for _ in range(KEPT_EVENTS + 10):
        log.record("noise", "pool", "x")
    assert len(log.since()) == KEPT_EVENTS


def test_an_event_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "gone", count().__next__)
    log.record("full", "pool", "no room")
    log.flush()
    assert len(log.since()) == 1
