"""The run file: what is written is what is meant, or it is refused by name, place and range."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import runspec
from protocol.errors import Code, Exit, Refused
from protocol.runspec import RunSection, RunSpec

RUN = '[run]\nname = "tiny"\n'


def refused(text):
    with pytest.raises(Refused) as caught:
        runspec.parse(text)
    assert caught.value.reason.exit is Exit.BAD_INPUT
    return caught.value


def test_the_template_says_the_defaults():
    assert runspec.parse(runspec.template("tiny")) == RunSpec(run=RunSection(name="tiny"))


def test_the_template_names_every_key():
    written = runspec.tomllib.loads(runspec.template("tiny"))
    spec = json.loads(RunSpec(run=RunSection(name="tiny")).to_json())
    assert {section: set(keys) for section, keys in written.items()} == {name: set(keys) for name, keys in spec.items()}


def test_a_name_is_all_that_must_be_written():
    assert runspec.parse(RUN).run.name == "tiny"
    assert "[run] is missing" in refused("").what
    assert "[run] name is missing" in refused("[run]\n").what


def test_a_file_is_read_with_a_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RUN.replace("\n", "\r\n").encode())
    assert runspec.load(path).run.name == "tiny"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'[run]\nname = "\xff"\n', "run.toml:2:9: not UTF-8"),
        (b"[run]\nname = tiny\n", "run.toml:2:8: Invalid value"),
        (b"[run\n", "run.toml:1:5: "),
        (b'[run]\nname = "tiny', "run.toml:2:13: "),
        (RUN.encode() + b'name = "other"\n', "run.toml:3:1: this key was given before"),
        (RUN.encode() + b"[run]\n", "run.toml:3:5: "),
        (b"\0" * 5, "run.toml:1:1: "),
        (b"# " * (1 << 16), "is over 65536 bytes"),
    ],
)
def test_a_syntax_error_is_placed_by_file_line_and_column(tmp_path, data, what):
    (tmp_path / "run.toml").write_bytes(data)
    with pytest.raises(Refused) as caught:
        runspec.load(tmp_path / "run.toml")
    assert caught.value.reason is Code.SPEC_SYNTAX
    assert what in caught.value.what


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(Refused) as caught:
            runspec.load(path)
        assert caught.value.reason is Code.RUN_MISSING


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("round = 3\n", "run.toml:3:1: [run] round is not a key of a run file; did you mean [run] rounds?"),
        ("[trian]\n", "run.toml:3:2: [trian] is not a key of a run file; did you mean [train]?"),
        ("[train]\n  learning_rat = 1\n", "run.toml:4:3: [train] learning_rat is not a key of a run file; "),
        ("inner_steps = [[1, 2]]\n", "did you mean [rounds] inner_steps?"),
        ("zzz = 1\n", "run.toml:3:1: [run] zzz is not a key of a run file"),
        ('"x\\u001b[31m" = 1\n', "[run] x?[31m is not a key"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(text, what):
    caught = refused(RUN + text)
    assert caught.reason is Code.SPEC_UNKNOWN_KEY
    assert what in caught.what


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('rounds = "ten"', '[run] rounds = "ten", wanted a whole number, at least 0 and at most 1000000000'),
        ("rounds = 1.5", "[run] rounds = 1.5, wanted a whole number"),
        ("rounds = true", "[run] rounds = true, wanted a whole number"),
        ("title = 2020-01-01", "[run] title: a date fits nowhere"),
        ('title = "a\\nb"', "wanted one line of printable characters"),
        (f'title = "{"a" * 121}"', "wanted at most 120 of them"),
        ("seed = -1", "[run] seed = -1"),
        ("min_nodes = 0", "at least 1 and at most 64"),
        ("[train]\nlearning_rate = 0", "[train] learning_rate = 0, wanted a number, more than 0 and at most 10"),
        ("[train]\nlearning_rate = -1.0", "more than 0"),
        ("[train]\nlearning_rate = 1e9", "at most 10"),
        ("[train]\nlearning_rate = nan", "learning_rate = NaN"),
        ("[train]\nmuon_learning_rate = inf", "muon_learning_rate = Infinity"),
        ("[train]\nmuon_momentum = 1.0", "less than 1"),
        ("[train]\nbetas = [0.9, 1.0]", "betas[1] = 1.0"),
        ("[train]\nbetas = [0.9]", "betas[1] is missing"),
        ("[train]\nbatch_sequences = 0", "at least 1 and at most 65536"),
        ("[train]\nbatch_sequences = 65537", "at least 1 and at most 65536"),
        ('[train]\noptimizer = "sgd"', "wanted 'muon' or 'adamw'"),
        ('[train]\nprecision = "int8"', "wanted 'auto'"),
        ("[rounds]\ninner_steps = [[25, 0]]", "inner_steps[0][1] = 0"),
        ("[rounds]\ninner_steps = []", "wanted at least 1 of them"),
        ("[rounds]\ninner_steps = 20", "inner_steps = 20"),
        ("[rounds]\nseconds_max = 0", "seconds_max = 0"),
        ("[rounds]\nseconds_max = 86401", "at most 86400"),
        ("[data]\ncontext = 7", "at least 8 and at most 1000000"),
        ("[data]\nheldout = 0", "more than 0 and at most 0.5"),
        ('[data]\ntokenizer = ""', 'tokenizer = ""'),
        ('[update]\ncodec = "int2"', "wanted 'fp16', 'int8', 'int4' or 'sparse2'"),
        ("[update]\nstale_rounds = 0", "stale_rounds = 0, wanted a whole number, at least 1 and at most 1000"),
        ("[watch]\nrollback = 1", "[watch] rollback = 1, wanted a valid boolean"),
        ("[watch]\njump = 0.0", "[watch] jump = 0.0, wanted a number, more than 0 and at most 20"),
        ("[watch]\njump = nan", "[watch] jump = NaN"),
        ("[watch]\nevaluations = 0", "at least 1 and at most 8"),
        ("[watch]\nevaluations = 9", "at least 1 and at most 8"),
        ("[watch]\nmost = 0", "at least 1 and at most 100"),
        ("[leases]\nhours_ahead = -1", "[leases] hours_ahead = -1, wanted a number, at least 0 and at most 168"),
        ("[leases]\nhours_ahead = 169", "at most 168"),
        ('[model]\narchitecture = "../x"', "wanted a model_type of the transformers library"),
        ("[model.config]\nvocab_size = 9", "vocab_size is filled in from [data]"),
        ('[model.config]\nauto_map = {AutoConfig = "x"}', "auto_map cannot be set by a run file"),
        ("[model.config]\ntrust_remote_code = true", "trust_remote_code cannot be set"),
        ("[model.config]\nrope.theta = nan", "nan is not a finite number"),
        ('[coordinator]\nlisten = "49300"', "wanted host:port"),
        ('[coordinator]\nlisten = "http://x:49300"', "wanted host:port"),
        ('[coordinator]\nlisten = "0.0.0.0:65536"', "wanted host:port"),
        ('[coordinator]\naddresses = ["0.0.0.0:49300"]', "wanted addresses that others can connect to"),
        (f"[coordinator]\naddresses = {['a.org:1'] * 9}", "wanted at most 8 of them"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused_with_the_range(text, what):
    caught = refused(RUN + text + "\n")
    assert caught.reason is Code.SPEC_VALUE
    assert what in caught.what
    assert caught.what.startswith(f"run.toml:{2 + len(text.splitlines())}:1: ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[update]\nouter = "nesterov"', 'outer = "nesterov" needs an outer_momentum between 0 and 1'),
        ('[update]\nouter = "average"\nouter_momentum = 0.9', 'outer = "average" needs outer_momentum = 0'),
        ('[update]\nmean = "sparse2"', 'mean = "sparse2" needs codec = "sparse2"'),
        ('[update]\ncodec = "sparse2"\nrobust = "trimmed"', "clip or mean fits"),
        ('[update]\nrobust = "centered"\ncodec = "sparse2"', "clip or mean fits"),
        ("[rounds]\ngather_seconds = 60\ndeadline_seconds = 60", "deadline_seconds must be more than gather_seconds"),
        ("[leases]\nseconds = 29", "at least 3 times [coordinator] heartbeat_seconds"),
        ("[leases]\nsequences = 3", "sequences must be at least 4"),
        ('[coordinator]\nhttp = "127.0.0.1:49300"', "http and listen must have different ports"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_by_their_rule(text, what):
    caught = refused(RUN + text + "\n")
    assert caught.reason is Code.SPEC_VALUE
    assert what in caught.what


def test_values_that_fit_together_pass():
    text = (
        '[update]\nouter = "nesterov"\nouter_momentum = 0.9\n[leases]\nseconds = 30\n[coordinator]\nlisten = "[::]:0"\n'
    )
    assert runspec.parse(RUN + text).update.outer_momentum == 0.9
    assert runspec.parse(RUN + "[leases]\nsequences = 4\n")


@pytest.mark.parametrize("name", ["", "Tiny", "a b", "../x", "a\\n", "-a", "ä", "a" * 41])
def test_a_run_has_a_name_that_is_safe_everywhere(name):
    assert "lower-case letters" in refused(f'[run]\nname = "{name}"\n').what


def test_the_place_of_an_error_is_found_in_every_way_of_writing():
    for text, place in [
        ('run.name = "x"\nrun.sed = 4\n', "run.toml:2:1"),
        ('run = {name = "x", sed = 4}\n', "run.toml:1:1"),
        ('["run"]\nname = "x"\n# sed\n\t"sed" = 4\n', "run.toml:4:2"),
        ('[run]\nname = "x"\n[model.config.rope]\ntheta = nan\n', "run.toml:4:1"),
    ]:
        assert refused(text).what.startswith(place + ":")


def test_hostile_nesting_is_refused_without_a_stack():
    for text in (f"x = {'[' * 60_000}", "a." * 5_000 + "a = 1\n", f"[model]\nconfig.{'a.' * 9}a = 1\n"):
        assert "nested" in refused(RUN + text).what


def test_an_endless_number_is_refused():
    assert refused(RUN + f"seed = {'9' * 60_000}\n").reason is Code.SPEC_SYNTAX


def test_the_last_pair_of_inner_steps_goes_on_for_ever():
    rounds = runspec.parse(RUN + "[rounds]\ninner_steps = [[2, 5], [1, 7]]\n").rounds
    assert [rounds.steps(number) for number in (0, 1, 2, 3, 10**9)] == [5, 5, 7, 7, 7]


def test_a_manifest_carries_the_whole_run_file():
    spec = runspec.parse(runspec.template("tiny") + "[model.config.rope_parameters]\nrope_theta = 1e4\n")
    assert RunSpec.from_json(spec.to_json()) == spec
    assert RunSpec.from_json(spec.to_json()).to_json() == spec.to_json()


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["train"].update(learning_rate=1e9),
        lambda spec: spec["train"].update(learning_rate="1"),
        lambda spec: spec.update(extra={}),
        lambda spec: spec["run"].update(name="../x"),
        lambda spec: spec["model"]["config"].update(trust_remote_code=True),
        lambda spec: spec["model"]["config"].update(x=float("nan")),
    ],
)
def test_a_hostile_spec_in_a_manifest_is_refused(change):
    spec = json.loads(RunSpec(run=RunSection(name="tiny")).to_json())
    change(spec)
    with pytest.raises(Refused):
        RunSpec.from_json(json.dumps(spec))


@given(
    st.text(max_size=60) | st.sampled_from(["[" * 10_000, '{"model":{"config":' + '{"a":' * 100 + "1" + "}" * 102, " "])
)
def test_anything_else_in_a_manifest_raises_nothing_but_a_refusal(text):
    with pytest.raises(Refused):
        RunSpec.from_json(text)


@given(st.integers())
def test_a_torn_run_file_raises_nothing_but_a_refusal(seed):
    luck = random.Random(seed)
    text = list(runspec.template("tiny"))
    for _ in range(luck.randint(1, 4)):
        at = luck.randrange(len(text))
        text[at : at + luck.randint(0, 30)] = luck.choice(["", "=", "[", '"', "9", "\n", "nan", "\x00", "."])
    try:
        assert isinstance(runspec.parse("".join(text)), RunSpec)
    except Refused as caught:
        assert len(caught.what) < 600


def test_learning_rates_fall_on_a_half_cosine_over_the_runs_inner_steps():
    spec = runspec.parse(RUN + "rounds = 4\n[rounds]\ninner_steps = [[2, 1], [1, 3]]\n[train]\ndecay_to = 0.2\n")
    assert [spec.rounds.steps_before(number) for number in range(6)] == [0, 1, 2, 5, 8, 11]
    shares = [spec.rate_share(number) for number in (0, 1, 2, 3, 4, 9)]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True)
    assert shares[2] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert shares[4] == shares[5] == pytest.approx(0.2)


def test_learning_rates_stay_in_a_run_that_never_ends():
    spec = runspec.parse(RUN + "rounds = 0\n")
    assert spec.rate_share(10**6) == 1.0
    assert "decay_to needs an end" in refused(RUN + "rounds = 0\n[train]\ndecay_to = 0.5\n").what
