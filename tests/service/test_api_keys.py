"""What a file of keys says, and how a key is made and recognised."""

import base64
import hashlib
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from service.api_keys import (
    MAX_KEYS,
    ApiKeysError,
    described,
    digest_of,
    find,
    make_key,
    parse_keys,
    read_keys,
)

FILE = Path("keys.toml")
DIGEST = "0f" * 32
KEY = f'[keys.shop]\nsha256 = "{DIGEST}"\nroles = ["score", "events"]\n'


def parse(text: str):
    return parse_keys(text.encode(), FILE)


def test_a_key_has_a_digest_and_roles_and_no_further_bounds_unless_said():
    (key,) = parse(KEY).keys.values()
    assert key.sha256 == DIGEST
    assert key.roles == {"score", "events"}
    assert (key.expires, key.requests_per_s, key.burst) == (None, None, None)


def test_several_keys_are_known_at_once():
    other = KEY.replace("shop", "shop-2").replace(DIGEST, "1e" * 32)
    assert list(parse(KEY + other).keys) == ["shop", "shop-2"]


@pytest.mark.parametrize(
    ("written", "expires"),
    [
        ("2027-05-01", datetime(2027, 5, 1, tzinfo=UTC)),
        ("2027-05-01T12:00:00Z", datetime(2027, 5, 1, 12, tzinfo=UTC)),
        ("2027-05-01T12:00:00+02:00", datetime(2027, 5, 1, 10, tzinfo=UTC)),
    ],
    ids=["a day begins in UTC", "a moment", "another zone"],
)
def test_a_key_may_expire(written, expires):
    assert parse(f"{KEY}expires = {written}").keys["shop"].expires == expires


def test_a_key_may_have_a_rate():
    key = parse(f"{KEY}requests_per_s = 0.5\nburst = 3").keys["shop"]
    assert (key.requests_per_s, key.burst) == (0.5, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "keys: Field required", id="nothing"),
        pytest.param("[keys]", "keys: Dictionary should have at least 1 item", id="no keys"),
        pytest.param("keys = ", r"not TOML: Invalid value \(at", id="no TOML"),
        pytest.param("x = " + "[" * 10_000, "not TOML", id="deep"),
        pytest.param(
            "[others]\n", "keys: Field required; others: Extra inputs", id="another table"
        ),
        pytest.param(KEY + "role = 1", "keys.shop.role: Extra inputs", id="unknown field"),
        pytest.param(
            KEY.replace(DIGEST, DIGEST.upper()), "keys.shop.sha256: String should match", id="upper"
        ),
        pytest.param(
            KEY.replace(DIGEST, DIGEST[:-2]), "keys.shop.sha256: String should match", id="short"
        ),
        pytest.param(
            KEY.replace('"events"', '"root"'),
            "keys.shop.roles.1: Input should be 'score'",
            id="role",
        ),
        pytest.param(
            KEY.replace('"score", "events"', ""), "keys.shop.roles: .* at least 1", id="no roles"
        ),
        pytest.param(
            KEY.replace("keys.shop", 'keys."the shop"'), "keys.the shop: String should", id="name"
        ),
        pytest.param(
            KEY + "expires = 2027-05-01T00:00:00",
            "keys.shop.expires: .* timezone",
            id="somewhere's time",
        ),
        pytest.param(KEY + "requests_per_s = 0.0", "requests_per_s: .* greater", id="no rate"),
        pytest.param(KEY + "requests_per_s = 1e-310", "requests_per_s: .* greater", id="hardly"),
        pytest.param(KEY + "requests_per_s = inf", "requests_per_s: .* finite", id="any rate"),
        pytest.param(
            f"{KEY}requests_per_s = 1.0\nburst = 1{'0' * 400}", "burst: .* less", id="any burst"
        ),
        pytest.param(KEY + "burst = 1" + "0" * 5000, "not TOML: .* digits", id="long number"),
        pytest.param(KEY + "burst = 1", "keys.shop: burst says something only", id="burst alone"),
        pytest.param(
            KEY + KEY.replace("shop", "web"), "keys: shop and web are the same key", id="twice"
        ),
        pytest.param(
            "".join(
                KEY.replace("shop", f"k{n}").replace(DIGEST, f"{n:064x}")
                for n in range(MAX_KEYS + 1)
            ),
            f"keys: Dictionary should have at most {MAX_KEYS} items",
            id="too many",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_file_place_and_reason(text, reason):
    with pytest.raises(ApiKeysError, match=rf"^keys\.toml: .*{reason}"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        'sha256 = "{key}"\nroles = ["score"]',
        '[keys.a]\nsha256 = "{key}"\nroles = ["score"]',
        '[keys.{key}]\nsha256 = "' + DIGEST + '"\nroles = ["score"]',
        '[keys.a]\nsha256 = "' + DIGEST + '"\nroles = ["{key}"]',
        '[keys.a]\nsha256 = {key}\nroles = ["score"]',
    ],
    ids=["at the top", "in place of its digest", "as a name", "as a role", "bare"],
)
def test_a_key_that_got_into_the_file_is_not_told(text):
    """The reason goes to a log."""
    key = make_key()
    with pytest.raises(ApiKeysError) as caught:
        parse(text.format(key=key))
    assert key not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_file_that_is_away_or_is_no_text_is_named(tmp_path):
    with pytest.raises(ApiKeysError, match=r"nowhere\.toml: cannot be read: No such file"):
        read_keys(tmp_path / "nowhere.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ApiKeysError, match=r"bytes\.toml: not TOML: not UTF-8"):
        read_keys(tmp_path / "bytes.toml")


def test_a_key_is_256_bits_behind_a_name_to_search_for_and_never_the_same():
    keys = {make_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert {key[:6] for key in keys} == {"mneme_"}
    assert {len(base64.urlsafe_b64decode(key[6:] + "=")) for key in keys} == {32}


def test_the_digest_is_the_plain_sha_256():
    assert digest_of(b"mneme_x") == hashlib.sha256(b"mneme_x").digest()


def test_the_lines_of_a_key_are_read_as_what_they_were_made_of():
    key = make_key()
    text = described(
        "shop-2",
        key,
        roles=["score", "read"],
        expires=date(2027, 5, 1),
        requests_per_s=20,
        burst=7,
    )
    read = parse(KEY + text).keys["shop-2"]
    assert key not in text
    assert read.sha256 == digest_of(key.encode()).hex()
    assert read.roles == {"score", "read"}
    assert read.expires == datetime(2027, 5, 1, tzinfo=UTC)
    assert (read.requests_per_s, read.burst) == (20.0, 7)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("The Shop", {}, "a key's name: String should match"),
        ("", {}, "a key's name: String should match"),
        ("shop", {"burst": 3}, "burst says something only beside requests_per_s"),
        ("shop", {"requests_per_s": -1.0}, "requests_per_s: .* greater than or equal to"),
    ],
    ids=["spaces", "no name", "a burst of no rate", "a negative rate"],
)
def test_lines_that_no_file_may_have_are_not_made(name, options, reason):
    with pytest.raises(ApiKeysError, match=reason):
        described(name, make_key(), roles=["score"], **options)


def test_a_key_is_found_wherever_it_stands():
    digests = [digest_of(bytes([n])) for n in range(5)]
    known = [(digest, n) for n, digest in enumerate(digests)]
    assert [find(digest, known) for digest in digests] == [0, 1, 2, 3, 4]
    assert find(digest_of(b"another"), known) is None
    assert find(digests[0], []) is None
