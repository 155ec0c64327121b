"""A policy's text: what it may say, where errors are, what holds for a volume."""

import tomllib
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs.errors import InvalidPolicy
from incfs.model import MAX_POLICY_BYTES
from incfs.policy.document import parse_policy
from incfs.policy.effective import effective_volume, rules_for, rules_for_pool, settings_of
from incfs.policy.lines import key_lines
from incfs.policy.rules import ALL, POOL_KEYS, VOLUME_KEYS, Keep
from incfs.settings import PoolSettings, VolumeSettings

POLICY = """
[pool]
low_water = "15%"
extend_by = "10G"
when_full = "queue:60s"   # then ENOSPC

[template.gold]
place = ["class=ssd"]
schedule = "hourly"
keep = { last = 3, hourly = 24, within = "2d" }

[template.safe]
stripe_columns = 2
schedule = "15m"

[volume."*"]
snapshot_max = 500

[volume."db*"]
use = ["gold", "safe"]
quota = "500G"
keep = { last = 1, yearly = "all" }
"""


def test_later_wins_and_says_from_where() -> None:
    policy = parse_policy(POLICY)
    found = effective_volume(policy, "db1")
    assert {key: value.source for key, value in found.items() if value.source != "built in"} == {
        "place": "[template.gold], line 8",
        "schedule": "[template.safe], line 14",
        "stripe_columns": "[template.safe], line 13",
        "keep": '[volume."db*"], line 22',
        "quota": '[volume."db*"], line 21',
        "snapshot_max": '[volume."*"], line 17',
    }
    rules = rules_for(policy, "db1")
    assert rules.keep == Keep(last=1, yearly=ALL)
    assert rules.settings == VolumeSettings(
        place=("class=ssd",), stripe_columns=2, quota_bytes=500 << 30, snapshot_max=500
    )
    assert rules_for(policy, "web").settings == VolumeSettings(snapshot_max=500)


def test_settings_of_the_pool() -> None:
    settings = settings_of(parse_policy(POLICY))
    assert settings.low_water.percent == Fraction(15)
    assert (settings.extend_bytes, settings.queue_s) == (10 << 30, 60.0)
    assert settings.volume_settings("db1").stripe_columns == 2


def test_an_empty_policy_changes_nothing() -> None:
    policy = parse_policy("")
    given, built_in = rules_for_pool(policy).settings, PoolSettings()
    assert [getattr(given, name) for name in given.__slots__ if name != "volume_settings"] == [
        getattr(built_in, name) for name in given.__slots__ if name != "volume_settings"
    ]
    assert rules_for(policy, "any").settings == VolumeSettings()
    assert rules_for(policy, "any").schedule is None


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("x = 1", 1, "unknown section 'x'"),
        ("\n[pool]\nfoo = 1", 3, "unknown key 'foo' in pool"),
        ('[pool]\nlow_water = "200%"', 2, "0% to 100%"),
        ('[pool]\nlow_water = "much"', 2, "is not a size"),
        ("[pool]\nextend_by = true", 2, "is not a size"),
        ('[pool]\nwhen_full = "queue"', 2, "is not a time"),
        ('[pool]\nwhen_full = "panic"', 2, "neither"),
        ('[pool]\ndirectories = ["a"]', 2, "not an absolute path"),
        ('[pool]\ndirectories = [{ path = "/a", clas = "ssd" }]', 2, "not 'clas'"),
        ('[pool]\ndirectories = [{ class = "ssd" }]', 2, "not a text"),
        ('[pool]\ndirectories = "/a"', 2, "is not a list"),
        ('[pool]\ntimezone = "Mars/Base"', 2, "no time zone"),
        ('[pool]\ntimezone = "/etc/localtime"', 2, "no time zone"),
        ('[pool]\nuse = ["gold"]', 2, "unknown key 'use'"),
        ("pool = 3", 1, "pool is not a section"),
        ("volume = 3", 1, "volume is not a section"),
        ("[volume]\ndb = 3", 2, 'volume "db" is not a section'),
        ('[template.a]\nuse = ["b"]', 2, "unknown key 'use'"),
        ('[volume."a"]\n\nuse = ["gold"]', 3, "no template 'gold'"),
        ('[volume."a"]\nuse = "gold"', 2, "is not a list"),
        ('[template.a]\nplace = ["color=red"]', 2, "KEY=VALUE"),
        ("[template.a]\nstripe_columns = 65", 2, "from 1 to 64"),
        ("[template.a]\nstripe_columns = true", 2, "from 1 to 64"),
        ('[template.a]\nverify = "sometimes"', 2, "not one of always, never"),
        ('[template.a]\nreplicate = "/pool"', 2, "not a list of tables"),
        ('[template.a]\nreplicate = [{ to = "/pool" }]', 2, "table of to, every"),
        ('[template.a]\nreplicate = [{ to = "/p", every = "1h", as = "x" }]', 2, "table of to, every"),
        ('[template.a]\nreplicate = [{ to = "http://h/p", every = "1h" }]', 2, "neither ssh://"),
        ('[template.a]\nreplicate = [{ to = "/p", every = "1h" }, { to = "/p", every = "2h" }]', 2, "twice"),
        ("[template.a]\nzero_elision = 0", 2, "neither true nor false"),
        ("[template.a]\nprune_when_low = 0", 2, "neither true nor false"),
        ('[template.a]\nstripe_unit = "96K"', 2, "power of two"),
        ('[template.a]\nschedule = "sometimes"', 2, "no schedule"),
        ("[template.a]\nkeep = {}", 2, "would remove every snapshot"),
        ("[template.a]\nkeep = { last = 0 }", 2, "would remove every snapshot"),
        ("[template.a]\nkeep = { last = -1 }", 2, "whole number"),
        ("[template.a.keep]\nlast = 1\nfortnightly = 2", 1, "unknown rule 'fortnightly'"),
        ('[template.a]\nbefore = "fsfreeze -f /x"', 2, "is not a list"),
        ('[template.a]\nbefore = ["fsfreeze"]', 2, "absolute path"),
        ('[template.a]\nhook_timeout = "2h"', 2, "1s to 1h"),
    ],
)
def test_errors_say_where(text: str, line: int, message: str) -> None:
    with pytest.raises(InvalidPolicy) as caught:
        parse_policy(text)
    assert caught.value.line == line
    assert caught.value.message.startswith(f"line {line} of the policy: ")
    assert message in caught.value.message


@pytest.mark.parametrize("text", ["[pool", "[pool]\nlow_water = ", "a = " + "[" * 9999, "x" * (MAX_POLICY_BYTES + 1)])
def test_what_is_no_toml_of_a_policy(text: str) -> None:
    with pytest.raises(InvalidPolicy):
        parse_policy(text)


def test_lines_of_every_kind_of_key() -> None:
    text = (
        '# [no] = 1\n[a] # x = 1\nb."c.d" = 1.5\ne = [ # hi\n  "[", """multi\nf = 3""",\n  {g = 1, h = \'}\'},\n]\n'
        "['i' . j]\r\nk = 2020-01-01T00:00:00Z\n[l]\nm = 'n'"
    )
    lines = key_lines(text)
    wanted = {
        ("a",): 2, ("a", "b"): 3, ("a", "b", "c.d"): 3, ("a", "e"): 4, ("a", "e", 0): 5, ("a", "e", 1): 5,
        ("a", "e", 2): 7, ("a", "e", 2, "g"): 7, ("a", "e", 2, "h"): 7, ("i",): 9, ("i", "j"): 9, ("i", "j", "k"): 10,
        ("l",): 11, ("l", "m"): 12,
    }  # fmt: skip
    assert tomllib.loads(text)
    assert lines == wanted


@given(st.text(alphabet="[]{}=,.\"'#\n ab1\\-", max_size=60))
def test_any_text_is_a_policy_or_an_error(text: str) -> None:
    try:
        parse_policy(text)
    except InvalidPolicy:
        return


def test_the_example_says_what_its_comments_do() -> None:
    policy = parse_policy((Path(__file__).parents[2] / "examples/policy.toml").read_text())
    assert rules_for(policy, "db1").settings == VolumeSettings(quota_bytes=500 << 30, snapshot_max=500)
    assert rules_for(policy, "web").keep == Keep(last=2, daily=14, monthly=6)
    assert rules_for(policy, "scratch-1").schedule is None


def test_every_key_is_in_the_reference() -> None:
    reference = (Path(__file__).parents[2] / "docs/POLICY.md").read_text()
    assert [key for key in (*POOL_KEYS, *VOLUME_KEYS) if f"`{key}`" not in reference] == []


def test_everything_at_once() -> None:
    policy = parse_policy(
        """
        [pool]
        low_water = "15%"
        extend_by = "10G"
        extend_max = "1T"
        reserve = "2%"
        when_full = "queue:60s"
        directories = ["/disks/a", { path = "/disks/b", class = "ssd" }]
        [template.gold]
        place = ["class=ssd"]
        copies = 2
        stripe_columns = 2
        stripe_unit = "1M"
        quota = "500G"
        reservation = "50G"
        zero_elision = true
        verify = "always"
        snapshot_max = 500
        schedule = "hourly"
        keep = { last = 3, hourly = 24, daily = 7, weekly = 4, monthly = 12, within = "2d" }
        replicate = [{ to = "ssh://backup/srv/incfs/pool0", every = "1h", keep = { daily = 7 } }]
        [volume."db*"]
        use = ["gold"]
        """
    )
    rules = rules_for(policy, "db1")
    assert rules.settings == VolumeSettings(
        place=("class=ssd",), copies=2, stripe_columns=2, quota_bytes=500 << 30, reservation_bytes=50 << 30,
        snapshot_max=500,
    )  # fmt: skip
    assert [(r.to, r.keep) for r in rules.replicate] == [("ssh://backup/srv/incfs/pool0", Keep(daily=7))]
    assert settings_of(policy).extend_max_bytes == 1 << 40
