"""Settings from environment and flags."""

import argparse
import traceback
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, add_flags, read_settings, write_settings

FIELDS = sorted(Settings.model_fields)


@pytest.fixture
def environment(monkeypatch):
    """Set variables for the test."""

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def parse(*arguments: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_description(name):
    description = Settings.model_fields[name].description
    assert description
    assert description.endswith(".")


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_a_flag_with_its_description_as_help(name):
    parser = argparse.ArgumentParser(prog="x", formatter_class=argparse.RawTextHelpFormatter)
    add_flags(parser)
    text = parser.format_help()
    assert f"--{name.replace('_', '-')} VALUE" in text
    assert (Settings.model_fields[name].description or "") in text


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("deadline_s", "is refused. (default: 0.03)"),
        ("redis_url", "with rediss+, too. (default: redis://127.0.0.1:6379/0)"),
        ("max_batch_work", "history length. (default: 6400000)"),
        ("anonymous", "keeps out whom it must. (default: False)"),
        ("max_connections", "where the limit of open files is low."),
        ("bundle", "the one arm is named main."),
    ],
)
def test_the_help_ends_with_the_default_where_there_is_one(name, ending):
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    add_flags(parser, [name])
    assert parser.format_help().rstrip().endswith(ending)


def test_only_what_is_served_must_be_given():
    assert read_settings({"bundle": "b"}) == Settings(bundle=Path("b"))
    assert read_settings({"experiments": "e"}) == Settings(experiments=Path("e"))


@pytest.mark.parametrize(
    "flags", [{}, {"bundle": "b", "experiments": "e"}], ids=["neither", "both"]
)
def test_a_bundle_or_experiments_must_be_given_and_not_both(flags):
    with pytest.raises(
        SettingsError, match=r"^settings: either a bundle or an experiments file must be given"
    ):
        read_settings(flags)


def test_defaults_serve_one_machine():
    settings = read_settings({"bundle": "b"})
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.provider == "cpu"
    assert settings.on_redis_failure == "refuse"
    assert settings.deadline_s == 0.03
    assert settings.recommend_deadline_s == 0.2


def test_variables_are_read(environment):
    environment(
        MNEME_BUNDLE="b",
        MNEME_PORT="9000",
        MNEME_DEADLINE_S="0.5",
        MNEME_ON_REDIS_FAILURE="cold",
        MNEME_REDIS_URL="redis://redis:6379/1",
    )
    assert read_settings({}) == Settings(
        bundle=Path("b"),
        port=9000,
        deadline_s=0.5,
        on_redis_failure="cold",
        redis_url="redis://redis:6379/1",
    )


def test_flags_are_read():
    flags = parse("--bundle", "b", "--port", "9000", "--key-prefix", "h", "--max-batch-work", "7")
    assert flags == {"bundle": "b", "port": "9000", "key_prefix": "h", "max_batch_work": "7"}
    assert read_settings(flags) == Settings(
        bundle=Path("b"), port=9000, key_prefix="h", max_batch_work=7
    )


def test_flags_win(environment):
    environment(
        MNEME_BUNDLE="b",
        MNEME_PORT="9000",
        MNEME_REDIS_URL="redis://variable",
        REDIS_URL="redis://variable",
    )
    settings = read_settings(parse("--port", "9001", "--redis-url", "redis://flag"))
    assert settings.port == 9001
    assert settings.redis_url == "redis://flag"


def test_redis_url_without_the_prefix_is_read(environment):
    environment(REDIS_URL="redis://elsewhere")
    assert read_settings({"bundle": "b"}).redis_url == "redis://elsewhere"


def test_the_variable_with_the_prefix_wins_over_redis_url(environment):
    """It was meant for this program; REDIS_URL may be there for another."""
    environment(REDIS_URL="redis://anyones", MNEME_REDIS_URL="redis://ours")
    assert read_settings({"bundle": "b"}).redis_url == "redis://ours"


def test_other_variables_without_the_prefix_are_not_read(environment):
    environment(PORT="9000", BUNDLE="other", HOST="0.0.0.0")
    assert read_settings({"bundle": "b"}) == Settings(bundle=Path("b"))


def test_unknown_variables_with_the_prefix_are_refused(environment):
    environment(MNEME_PROT="9000", MNEME_BUNDEL="b", MNEME_PORT="9000")
    with pytest.raises(
        SettingsError,
        match=r"unknown environment variables MNEME_BUNDEL, MNEME_PROT; known are .*MNEME_PORT",
    ):
        read_settings({"bundle": "b"})


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(Settings(bundle=Path("b")), id="defaults"),
        pytest.param(
            Settings(
                experiments=Path("/a folder/of experiments.toml"),
                redis_url="rediss://user:p%40ss@redis:6380/3",
                key_prefix="shop:a",
                redis_timeout_s=0.1 + 0.2,
                on_redis_failure="cold",
                host="::",
                port=1,
                workers=7,
                provider="cuda",
                threads=3,
                deadline_s=1 / 3,
                recommend_deadline_s=2 / 3,
                recommend_block_items=1000,
                max_batch_work=1,
                max_queue_work=2**40,
                max_body_bytes=1,
                max_clock_skew_s=0,
                titles=Path("/a folder/of titles.csv"),
                log_level="debug",
                log_format="text",
                log_personal_data=True,
                slow_request_s=1 / 7,
                slow_log_per_s=0.0,
                tracing="otel",
                max_header_bytes=1024,
                request_read_s=1 / 9,
                keep_alive_s=1 / 11,
                wedged_s=7.5,
                max_connections=12,
                answer_taken_s=2.5,
                api_keys=Path("/a folder/of keys.toml"),
                anonymous=True,
                admin_port=2,
                admin_host="::1",
                redis_password_file=Path("/a folder/with a password"),
                idempotency_life_s=1 / 9,
                reload_poll_s=0.7,
                drain_s=0.0,
            ),
            id="none of the defaults",
        ),
    ],
)
def test_written_settings_are_read_as_the_same(environment, settings):
    """They are how workers come to know theirs."""
    environment(REDIS_URL="redis://anyones")
    environment(**write_settings(settings))
    assert read_settings({}) == settings


def test_the_settings_above_are_none_of_the_defaults():
    """Or the way there and back would prove nothing of a new setting."""
    (mark,) = test_written_settings_are_read_as_the_same.pytestmark
    defaults, others = (dict(param.values[0]) for param in mark.args[1])
    assert [name for name in FIELDS if defaults[name] == others[name]] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param({"port": "many"}, "port: Input should be a valid integer", id="no number"),
        pytest.param({"port": "65536"}, "port: .* less than or equal to 65535", id="port"),
        pytest.param({"provider": "tpu"}, "provider: Input should be 'cpu' or 'cuda'", id="choice"),
        pytest.param({"deadline_s": "0"}, "deadline_s: .* greater than 0", id="no time"),
        pytest.param({"deadline_s": "nan"}, "deadline_s: ", id="nan"),
        pytest.param(
            {"recommend_deadline_s": "0"}, "recommend_deadline_s: .* greater", id="no time to rank"
        ),
        pytest.param(
            {"recommend_block_items": "0"}, "recommend_block_items: .* greater", id="empty blocks"
        ),
        pytest.param({"redis_timeout_s": "-1"}, "redis_timeout_s: .* greater", id="negative"),
        pytest.param({"workers": "0"}, "workers: .* greater", id="no workers"),
        pytest.param({"workers": "257"}, "workers: .* less", id="many workers"),
        pytest.param({"reload_poll_s": "0"}, "reload_poll_s: .* greater", id="no pause"),
        pytest.param({"drain_s": "-1"}, "drain_s: .* greater", id="back in time"),
        pytest.param({"wedged_s": "0"}, "wedged_s: .* greater", id="all are wedged"),
        pytest.param({"max_batch_work": "0"}, "max_batch_work: .* greater", id="no work"),
        pytest.param({"max_body_bytes": "1e3"}, "max_body_bytes: .* integer", id="float"),
        pytest.param({"key_prefix": ""}, "key_prefix: String should have", id="empty prefix"),
        pytest.param(
            {"key_prefix": "mneme-idempotency"},
            "key_prefix: idempotency keys stand under mneme-idempotency:, expected another",
            id="prefix of others",
        ),
        pytest.param(
            {"key_prefix": "mneme-idempotency:shop"}, "key_prefix: .* another", id="below it"
        ),
        pytest.param({"on_redis_failure": "warm"}, "on_redis_failure: .*'cold'", id="warm"),
        pytest.param({"log_level": "loud"}, "log_level: Input should be 'debug'", id="loud"),
        pytest.param({"log_format": "xml"}, "log_format: Input should be 'json'", id="format"),
        pytest.param({"slow_request_s": "0"}, "slow_request_s: .* greater", id="all are slow"),
        pytest.param({"slow_log_per_s": "-1"}, "slow_log_per_s: .* greater", id="fewer than none"),
        pytest.param({"tracing": "on"}, "tracing: Input should be 'off' or 'otel'", id="tracing"),
        pytest.param({"max_header_bytes": "1023"}, "max_header_bytes: .* greater", id="tiny head"),
        pytest.param({"request_read_s": "0"}, "request_read_s: .* greater", id="no time to read"),
        pytest.param({"keep_alive_s": "inf"}, "keep_alive_s: .* finite", id="for ever"),
        pytest.param({"redis_timeout_s": "inf"}, "redis_timeout_s: .* finite", id="no timeout"),
        pytest.param({"admin_port": "0"}, "admin_port: .* greater", id="any admin port"),
        pytest.param({"admin_port": "8000"}, "settings: port and admin_port are", id="one port"),
        pytest.param({"anonymous": "perhaps"}, "anonymous: Input should be a valid", id="perhaps"),
        pytest.param({"redis_url": "nonsense"}, "redis_url: ", id="no URL"),
        pytest.param({"redis_url": "http://redis"}, "redis_url: ", id="another scheme"),
        pytest.param({"redis_url": "redis://host:port"}, "redis_url: ", id="no port"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_name(flags, message):
    with pytest.raises(SettingsError, match=f"^{message}"):
        read_settings({"bundle": "b", **flags})


@pytest.mark.parametrize(
    "url",
    [
        "redis://:a-secret@redis:6379/0",
        "rediss://user:a-secret@redis",
        "redis://redis:6379/0?password=a-secret",
        "redis+sentinel://h1,h2/mymaster?socket_timeout=1&sentinel_password=a-secret",
        "rediss://redis?ssl_password=a-secret",
    ],
)
def test_a_password_in_a_flag_is_refused_and_not_repeated(url):
    """Every user of the machine sees the flags of a process."""
    with pytest.raises(SettingsError, match=r"^redis_url: .* by the variable REDIS_URL$") as caught:
        read_settings({"bundle": "b", "redis_url": url})
    assert "a-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["redis://user:a-secret#x@redis", "redis://:a-secret@redis:port", "http://u:a-secret@redis"],
    ids=["a number sign in it", "no port", "another scheme"],
)
def test_an_error_in_a_url_with_a_password_does_not_repeat_it(environment, url):
    """For one, the password's beginning is a port, and urllib says which, where # ends the host."""
    environment(REDIS_URL=url)
    with pytest.raises(SettingsError, match=r"^redis_url: .*redis://") as caught:
        read_settings({"bundle": "b"})
    assert "a-secret" not in "".join(traceback.format_exception(caught.value))


def test_the_redis_url_is_not_shown_with_the_settings(environment):
    environment(REDIS_URL="redis://user:a-secret@redis")
    settings = read_settings({"bundle": "b"})
    assert settings.redis_url == "redis://user:a-secret@redis"
    assert "a-secret" not in f"{settings!r} {settings}"


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(SettingsError, match=r"port: Input .*; provider: Input"):
        read_settings({"port": "many", "provider": "tpu"})


def test_settings_cannot_be_changed_later():
    settings = read_settings({"bundle": "b"})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_a_flag_that_is_no_setting_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--prot", "9000")
    assert "unrecognized arguments: --prot" in capsys.readouterr().err
