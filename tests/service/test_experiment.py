"""What an experiments file says, and who is answered by which arm."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from service.experiment import (
    MAX_ARMS,
    ArmSettings,
    Experiment,
    ExperimentError,
    parse_experiment,
    read_experiment,
)

USERS = [str(user) for user in range(100_000)]
TWO_ARMS = """
salt = "november"

[arms.din]
bundle = "bundles/din"
share = 0.5

[arms.imn]
bundle = "/srv/imn"
share = 0.5
history_length = 200
"""


def experiment(shares: dict[str, float], *, salt: str = "s", **shadows: float) -> Experiment:
    arms = {name: ArmSettings(bundle=Path(name), share=share) for name, share in shares.items()}
    for name, share in shadows.items():
        arms[name] = ArmSettings(bundle=Path(name), share=share, shadow=True)
    return Experiment(salt=salt, arms=arms)


def arms_of(users: list[str], one: Experiment) -> list[str]:
    return [one.arm_of(user) for user in users]


class TestFile:
    def test_it_says_what_is_served_to_whom(self, tmp_path):
        path = tmp_path / "experiments.toml"
        path.write_text(TWO_ARMS)
        found = read_experiment(path)
        assert found.salt == "november"
        assert list(found.arms) == ["din", "imn"]
        assert found.arms["din"].bundle == tmp_path.resolve() / "bundles" / "din"
        assert found.arms["imn"].bundle == Path("/srv/imn")
        assert [arm.history_length for arm in found.arms.values()] == [None, 200]
        assert [arm.share for arm in found.arms.values()] == [0.5, 0.5]
        assert not any(arm.shadow for arm in found.arms.values())

    def test_a_bundle_is_where_its_link_points(self, tmp_path):
        """A link that is turned to another folder names another bundle."""
        path = tmp_path / "experiments.toml"
        path.write_text('salt = "s"\n[arms.main]\nbundle = "current"\nshare = 1')
        found = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            (tmp_path / "current").unlink(missing_ok=True)
            (tmp_path / "current").symlink_to(name)
            found.append(read_experiment(path).arms["main"].bundle.name)
        assert found == ["one", "other"]

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(ExperimentError, match=r"x\.toml: cannot be read: No such file"):
            read_experiment(tmp_path / "x.toml")

    @pytest.mark.parametrize(
        ("changed", "to", "message"),
        [
            pytest.param('salt = "november"', "", "salt: Field required", id="no salt"),
            pytest.param('"november"', '""', "salt: String should have at least 1", id="empty"),
            pytest.param("[arms.din]", "[arms.din", "not TOML", id="no TOML"),
            pytest.param("[arms.din]", "[arms.D]", "arms.D", id="name"),
            pytest.param("share = 0.5", "", "arms.din.share: Field required", id="no share"),
            pytest.param("share = 0.5", "share = 0.4", "must add up to 1, they add", id="sum"),
            pytest.param("share = 0.5", "share = -1", "arms.din.share: Input", id="negative"),
            pytest.param("share = 0.5", "share = nan", "arms.din.share: Input", id="nan"),
            pytest.param("share = 0.5", 'share = "a"', "arms.din.share: Input", id="word"),
            pytest.param("share = 0.5", "shares = 0.5", "arms.din.shares: Extra", id="unknown"),
            pytest.param("history_length = 200", "history_length = 0", "history_len", id="none"),
            pytest.param('bundle = "bundles/din"', "bundle = 3", "arms.din.bundle", id="bundle"),
            pytest.param("[arms.din]", "[arm.din]", "arm: Extra inputs", id="unknown table"),
        ],
    )
    def test_what_cannot_be_is_refused_with_the_place(self, tmp_path, changed, to, message):
        assert changed in TWO_ARMS
        path = tmp_path / "experiments.toml"
        with pytest.raises(ExperimentError, match=rf"^{path}: .*") as refused:
            parse_experiment(TWO_ARMS.replace(changed, to, 1).encode(), path)
        assert message in str(refused.value)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path):
        with pytest.raises(ExperimentError, match="not TOML"):
            parse_experiment(b"\xff\xfe", tmp_path / "x.toml")

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"a = " + b"[" * 100_000, id="nested"),
            pytest.param(b"a = " + b"1" * 5000, id="a huge number"),
            pytest.param(b"a = 2026-13-41", id="no date"),
            pytest.param(b"\0", id="NUL"),
        ],
    )
    def test_what_no_parser_reads_is_refused(self, tmp_path, content):
        with pytest.raises(ExperimentError, match="not TOML"):
            parse_experiment(content, tmp_path / "x.toml")

    @pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
    @pytest.mark.parametrize("field", ["share", "weight"])
    def test_numbers_are_finite(self, tmp_path, field, number):
        fields = {"share": "1.0", field: number}
        lines = "".join(f"{name} = {value}\n" for name, value in fields.items())
        content = f'salt = "s"\n[arms.a]\nbundle = "a"\n{lines}'.encode()
        with pytest.raises(ExperimentError, match=rf"arms\.a\.{field}: .*(finite|greater)"):
            parse_experiment(content, tmp_path / "x.toml")

    def test_a_bundle_that_cannot_be_a_path_is_refused_by_its_arm(self, tmp_path):
        content = b'salt = "s"\n[arms.a]\nbundle = "a\\u0000b"\nshare = 1.0'
        with pytest.raises(ExperimentError, match=r"arms\.a\.bundle: embedded null byte"):
            parse_experiment(content, tmp_path / "x.toml")

    def test_links_in_a_circle_are_refused_by_their_arm(self, tmp_path):
        (tmp_path / "a").symlink_to("a")
        content = b'salt = "s"\n[arms.a]\nbundle = "a"\nshare = 1.0'
        with pytest.raises(ExperimentError, match=r"arms\.a\.bundle: Symlink loop"):
            parse_experiment(content, tmp_path / "x.toml")

    def test_a_pipe_in_place_of_the_file_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "x.toml")
        with pytest.raises(ExperimentError, match="cannot be read: not a plain file"):
            read_experiment(tmp_path / "x.toml")

    def test_there_are_no_more_arms_than_metrics_can_name(self):
        n = MAX_ARMS + 1
        with pytest.raises(ValueError, match=f"at most {MAX_ARMS}"):
            experiment({f"arm-{k}": 1 / n for k in range(n)})

    def test_a_shadow_counts_to_no_share(self):
        assert experiment({"main": 1.0}, next=0.3).shadows_of("nobody") in ([], ["next"])


class TestAssignment:
    def test_shares_are_met_within_half_a_percent_of_100_000_users(self):
        shares = {"a": 0.5, "b": 0.3, "c": 0.2}
        found = Counter(arms_of(USERS, experiment(shares)))
        for arm, share in shares.items():
            assert abs(found[arm] / len(USERS) - share) < 0.005

    def test_another_process_deals_100_000_users_out_alike(self):
        """Nothing of it may hang on the hash of the process, or on the order of the arms."""
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from service.experiment import ArmSettings, Experiment\n"
            "arms = {n: ArmSettings(bundle=Path(n), share=0.5) for n in ('imn', 'din')}\n"
            "one = Experiment(salt='s', arms=arms)\n"
            "print(''.join(one.arm_of(str(user))[0] for user in range(100_000)))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": "7"},
        )
        found = arms_of(USERS, experiment({"din": 0.5, "imn": 0.5}))
        assert done.stdout.strip() == "".join(arm[0] for arm in found)

    def test_assignments_of_a_running_experiment_outlive_releases(self):
        """Written down once: whoever changes the hash moves the users of every running test."""
        found = arms_of(["1", "2", "3", "ann", "böb", "x" * 128], experiment({"a": 0.5, "b": 0.5}))
        assert found == ["b", "b", "a", "a", "a", "b"]

    def test_a_growing_arm_takes_from_the_others_and_moves_nobody_between_them(self):
        before = arms_of(USERS, experiment({"a": 0.45, "b": 0.45, "c": 0.1}))
        after = arms_of(USERS, experiment({"a": 0.35, "b": 0.35, "c": 0.3}))
        moved = Counter((one, other) for one, other in zip(before, after, strict=True))
        assert {pair for pair in moved if pair[0] != pair[1]} == {("a", "c"), ("b", "c")}
        assert abs((moved["a", "c"] + moved["b", "c"]) / len(USERS) - 0.2) < 0.005

    def test_another_salt_deals_the_users_out_anew(self):
        one, other = (
            np.array(arms_of(USERS, experiment({"a": 0.5, "b": 0.5}, salt=salt))) for salt in "st"
        )
        assert abs(np.mean(one == other) - 0.5) < 0.005

    def test_an_arm_without_a_share_answers_nobody(self):
        assert set(arms_of(USERS[:1000], experiment({"a": 1.0, "testers": 0.0}))) == {"a"}

    def test_a_shadow_listens_to_its_share_of_every_arms_users(self):
        one = experiment({"a": 0.5, "b": 0.5}, c=0.2)
        listens = np.array([one.shadows_of(user) == ["c"] for user in USERS])
        arms = np.array(arms_of(USERS, one))
        for arm in ("a", "b"):
            assert abs(listens[arms == arm].mean() - 0.2) < 0.01


@pytest.mark.parametrize(
    ("chosen", "weight"),
    [
        ({"share": 0.3}, 0.3),
        ({"share": 0.3, "weight": 2.0}, 2.0),
        ({"share": 0.3, "shadow": True}, 0.03),
        ({"share": 0.0}, 0.01),
    ],
    ids=["its share", "as it says", "a tenth for a shadow", "a little for testers"],
)
def test_an_arm_weighs_on_the_device(chosen, weight):
    assert ArmSettings(bundle=Path("b"), **chosen).device_weight == pytest.approx(weight)
