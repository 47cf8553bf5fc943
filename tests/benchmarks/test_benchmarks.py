import contextlib
import io
import json
import struct
from collections import Counter
from functools import partial

import pytest
import torch
from ignite.engine import Events

from tests.benchmarks import parts, training_steps
from tests.benchmarks.__main__ import main
from tests.benchmarks.measure import in_turns, ratios, summary, threads
from tests.benchmarks.memory import memory_of, quick_collections
from tests.benchmarks.model_costs import swap
from tests.benchmarks.models import AVERAGED_IN, MODELS
from tests.benchmarks.peers import EVENT, LIMIT, OURS, PEERS, Peer, Unavailable, event, limit, update_of

CPU = torch.device("cpu")
QUARTILES = {"q1", "median", "q3"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tests run side by side, and threads that wait for each other would take minutes."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def measured(one_thread, tmp_path_factory):
    """The directory of a small run, which it was given no other files for, and what the run has printed."""
    folder, printed = tmp_path_factory.mktemp("benchmarks"), io.StringIO()
    targets = ["--json", str(folder / "figures.json"), "--picture", str(folder / "picture.png")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        _shrink(patch)
        main(["--models", "mlp", "--rounds", "2", *targets])
    return folder, printed.getvalue()


@pytest.fixture
def figures(measured):
    """Of the small run; a test may change them."""
    return json.loads((measured[0] / "figures.json").read_text(encoding="utf-8"))


def _shrink(patch):
    """A transformer of 90,000 parameters."""
    patch.setattr(training_steps, "_WIDTH", 64)
    patch.setattr(training_steps, "_LAYERS", 1)
    patch.setattr(training_steps, "_VOCABULARY", 300)


def _built(peer, model, dtype=None):
    try:
        return PEERS[peer](model, 0.5, dtype)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "buffers"),
    [
        ("mlp", 8_970, 6, 0),
        ("many", 984_000, 1_200, 0),
        ("resnet50", 25_557_032, 161, 159),
        ("gpt2", 124_439_808, 148, 0),
        ("gpt2-bfloat16", 124_439_808, 148, 0),
    ],
)
def test_models_have_the_published_numbers_of_tensors(name, parameters, tensors, buffers):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    assert len(list(model.buffers())) == buffers
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    assert all(p.dtype == dtype for p in model.parameters())
    assert AVERAGED_IN.get(name, dtype) == torch.float32


@pytest.mark.parametrize("name", PEERS)
def test_updates_and_swaps_leave_the_model_as_it_is(name):
    model = MODELS["mlp"]()
    peer = _built(name, model)
    update = update_of(peer)
    with torch.no_grad():
        for _ in range(4):
            update()
            for parameter in model.parameters():
                parameter.add_(1)
    before = [p.clone() for p in model.parameters()]
    update()
    averaged = [p.clone() for p in peer.averaged()]
    assert not any(map(torch.equal, before, averaged))
    if peer.swapped is not None:
        with peer.swapped():
            assert all(map(torch.equal, averaged, model.parameters()))
        swap(peer)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, averaged, peer.averaged()))


@pytest.mark.parametrize("name", PEERS)
def test_peers_hold_the_average_in_float32_or_say_that_they_cannot(name):
    model = MODELS["mlp"]().bfloat16()
    if name == "AveragedModel":
        with pytest.raises(Unavailable, match="cannot average weights of one type in another"):
            PEERS[name](model, 0.5, torch.float32)
        return
    peer = _built(name, model, torch.float32)
    update_of(peer)()
    assert all(p.dtype == torch.float32 for p in peer.averaged())


def test_the_limit_moves_as_many_bytes_as_an_average_has_to():
    model = MODELS["mlp"]()
    assert limit(model).func.__self__.numel() == 8_970
    half = MODELS["mlp"]().bfloat16()
    assert limit(half, torch.float32).func.__self__.numel() == 8_970 * 10 // 12


def test_turns_are_in_an_order_of_their_own_each_round():
    order = []
    names = list("abcdef")
    values = in_turns({name: lambda name=name: order.append(name) or float(len(order)) for name in names}, range(5))
    rounds = [order[6 * i : 6 * i + 6] for i in range(5)]
    assert all(sorted(one) == names for one in rounds)
    assert len(set(map(tuple, rounds))) == 5
    assert [values[name][2] for name in rounds[2]] == [13, 14, 15, 16, 17, 18]


def test_summaries_are_medians_and_quartiles():
    assert summary([5, 1, 2, 4, 3], scale=10) == {"q1": 20, "median": 30, "q3": 40}
    assert ratios([1, 2], [2, 8]) == [0.5, 0.25]


def test_memory_is_counted_to_the_byte():
    with quick_collections():
        assert memory_of(lambda: torch.ones(1000), CPU) == (4000, 4000)
        assert memory_of(lambda: float(torch.ones(1000)[0]), CPU) == (4000, 0)
        assert memory_of(lambda: None, CPU) == (0, 0)


def test_the_file_says_where_the_figures_come_from(figures, measured):
    origin = {"date", "machine", "device", "device_name", "cores", "threads", "python", "packages"}
    assert figures.keys() == origin | {"rounds", "models", "training"}
    assert figures["packages"].keys() >= {"torch", "pytorch-ignite", "ignite-ema"}
    assert (figures["device"], figures["packages"]["torch"]) == ("cpu", torch.__version__)
    assert set(figures["rounds"].values()) == {2}
    assert {path.name for path in measured[0].iterdir()} == {"figures.json", "picture.png"}


def test_models_have_figures_of_every_cost(figures):
    assert figures["models"].keys() == {"mlp"}
    mlp = figures["models"]["mlp"]
    assert (mlp["parameters"], mlp["parameter_tensors"], mlp["buffer_tensors"]) == (8_970, 6, 0)
    peers = PEERS.keys() - mlp["missing"].keys()
    assert mlp["update"].keys() == peers | {EVENT, LIMIT}
    assert mlp["construction"].keys() == mlp["state_dict"].keys() == peers
    assert mlp["swapped"].keys() == peers & {OURS, "diffusers", "torch_ema", "lightning"}
    for cost in ("update", "construction", "state_dict", "swapped"):
        own = {"to_limit"} if cost == "update" else {"peak", "left"}
        for figure in mlp[cost].values():
            assert figure.keys() == {"batch", "ms", "to_ours"} | own
            assert figure["ms"].keys() == figure["to_ours"].keys() == QUARTILES
        assert mlp[cost][OURS]["to_ours"] == dict.fromkeys(QUARTILES, 1)
    assert mlp["update"][LIMIT]["to_limit"]["median"] == 1


def test_memory_is_in_copies_of_the_model(figures):
    mlp = figures["models"]["mlp"]
    construction, swapped, state = (mlp[cost][OURS] for cost in ("construction", "swapped", "state_dict"))
    assert construction["left"] == pytest.approx(1, abs=0.001)  # and a few numbers
    assert 1 <= construction["peak"] < 1.01
    assert (swapped["peak"], swapped["left"]) == (1, 0)
    assert (state["peak"], state["left"]) == (0, 0)


def test_training_steps_are_measured_with_and_without_each_average(figures):
    assert figures["training"].keys() == {"digits", "transformer"}
    for training in figures["training"].values():
        assert training["peers"].keys() | training["missing"].keys() == PEERS.keys()
        assert training["bare"].keys() == QUARTILES
        assert all(figure.keys() == {"ms", "percent"} for figure in training["peers"].values())
    digits = figures["training"]["digits"]
    assert (digits["parameters"], digits["iterations"], digits["threads"]) == (3_842, 32, 1)


@pytest.mark.parametrize("name", training_steps.TRAININGS)
def test_averages_leave_training_as_it_is(name, monkeypatch):
    _shrink(monkeypatch)
    training = training_steps.TRAININGS[name]()
    runs, _ = training_steps.runs_of(training, CPU)
    before = [p.clone() for p in runs["bare"].model.parameters()]
    for run in runs.values():
        run.go_through(training.batches)
        run.go_through(training.batches)
    bare, *others = [list(run.model.parameters()) for run in runs.values()]
    assert not any(map(torch.equal, before, bare))
    assert all(all(map(torch.equal, bare, other)) for other in others)


def test_averages_are_updated_at_each_step(monkeypatch):
    updates = Counter()

    def counting(model, momentum, dtype):
        def attach(trainer):
            trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: updates.update([momentum]))

        return Peer(attach, model.parameters, dict)

    monkeypatch.setattr(training_steps, "PEERS", {"counting": counting})
    figures = training_steps.training_costs("digits", CPU, 3, lambda title, number: range(number))
    assert updates == {0.001: (3 + 1) * 32}  # one round to warm up
    assert figures["peers"].keys() == {"counting"}


def test_tables_fit_100_columns(measured):
    lines = measured[1].splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in measured[1]
    assert sum(line.strip().startswith(OURS) for line in lines) == 6  # four costs, two trainings


def test_the_picture_is_a_png_of_1600_pixels_across(measured):
    data = (measured[0] / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">I", data[16:20]) == (1600,)


def test_figures_of_a_file_give_the_same_tables_and_picture(measured, tmp_path, capsys):
    folder, printed = measured
    main(["--from-json", str(folder / "figures.json"), "--picture", str(tmp_path / "again.png")])
    assert capsys.readouterr().out == printed
    assert (tmp_path / "again.png").read_bytes() == (folder / "picture.png").read_bytes()


def test_pictures_show_peers_that_are_missing_in_one_model(figures, measured, tmp_path, capsys):
    figures["models"]["other"] = json.loads(json.dumps(figures["models"]["mlp"]))
    del figures["models"]["mlp"]["update"]["ignite"]
    figures["models"]["mlp"]["missing"]["ignite"] = "it is [/] tired"  # no markup
    file, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    file.write_text(json.dumps(figures), encoding="utf-8")
    main(["--from-json", str(file), "--picture", str(picture)])
    assert "ignite: it is [/] tired" in capsys.readouterr().out
    assert picture.stat().st_size > (measured[0] / "picture.png").stat().st_size


def test_pictures_are_overwritten_on_demand_only(measured, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    picture.write_text("precious", encoding="utf-8")
    arguments = ["--from-json", str(measured[0] / "figures.json"), "--picture", str(picture)]
    _refuse(arguments, f"--picture should name a new file, but {picture} exists; pass --force", capsys)
    assert picture.read_text(encoding="utf-8") == "precious"
    main([*arguments, "--force"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_figures_are_overwritten_on_demand_only(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.benchmarks.__main__._measured", lambda options: figures)
    file = tmp_path / "figures.json"
    file.write_text("precious", encoding="utf-8")
    arguments = ["--json", str(file)]
    _refuse(arguments, f"{file} exists; pass --force", capsys)
    assert file.read_text(encoding="utf-8") == "precious"
    main([*arguments, "--force"])
    assert json.loads(file.read_text(encoding="utf-8")) == figures


def _set(path, value, figures):
    *parents, key = path.split(".")
    for parent in parents:
        figures = figures[parent]
    figures[key] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda figures: figures.pop("rounds"), "'rounds' is a required property"),
        (
            lambda figures: figures["models"]["mlp"]["update"].pop(LIMIT),
            "models.mlp.update: 'lerp' is a required property",
        ),
        (partial(_set, "models", {}), "models: {} should be non-empty"),
        (partial(_set, "models.mlp.swapped", []), "models.mlp.swapped: [] is not of type 'object'"),
        (partial(_set, "models.mlp.update.lerp.ms.q1", 0), "models.mlp.update.lerp.ms.q1: 0 is less than or equal to"),
        (partial(_set, "training.digits.bare.q3", float("nan")), "NaN is not a number"),
        (partial(_set, "threads", True), "threads: True is not of type 'number'"),
        (partial(_set, "date", 2026), "date: 2026 is not of type 'string'"),
    ],
)
def test_figures_that_are_not_whole_are_refused(change, message, figures, tmp_path, capsys):
    change(figures)
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(figures), encoding="utf-8")
    _refuse(["--from-json", str(file)], message, capsys)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x89PNG", "[" * 100_000])
def test_files_of_another_kind_are_refused(text, tmp_path, capsys):
    file = tmp_path / "figures.json"
    file.write_text(text, encoding="utf-8")
    _refuse(["--from-json", str(file)], f"--from-json should name a file that --json has written, got {file} (", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds: should be a whole number from 2, since one round has no spread, got '1'"),
        (["--rounds", "many"], "got 'many'; leave it out for 100"),
        (["--models", "bert"], "--models: invalid choice: 'bert'"),
        (["--models", "mlp", "mlp"], "--models should name each once, got mlp mlp"),
        (["--training", "bert"], "--training: invalid choice: 'bert'"),
        (["--force"], "--force should come with --json FILE or --picture FILE, got neither"),
        (["--json", "/does/not/exist/figures.json"], "--json should name a file in a directory that exists"),
        (["--picture", "/does/not/exist/picture.png"], "--picture should name a file in a directory that exists"),
        (["--json", "/", "--force"], "--json should name a file, got /, a directory"),
        (["--picture", "picture.jpeg"], "--picture should name a file that ends in .png, got picture.jpeg"),
        (["--from-json", "/does/not/exist"], "got /does/not/exist (No such file or directory); measure again"),
        (["--from-json", "/", "--rounds", "2", "--device", "cpu"], "measure nothing, got --rounds, --device as well"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments, message, capsys):
    _refuse(arguments, message, capsys)


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _refuse(["--device", "cuda"], "--device should be one that torch finds here, got cuda, and it finds none", capsys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_figures_of_a_cuda_device(tmp_path):
    file = tmp_path / "figures.json"
    main(["--models", "mlp", "--training", "--rounds", "2", "--device", "cuda", "--json", str(file)])
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert (figures["device"], figures["device_name"]) == ("cuda", torch.cuda.get_device_name())
    assert figures["models"]["mlp"]["swapped"][OURS]["peak"] >= 1
    assert limit(MODELS["mlp"]().cuda()).func.__self__.is_cuda


def test_an_event_does_nothing():
    assert event()() is None


def _refuse(arguments, message, capsys):
    """The program ends with one sentence in one line, and measures nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.benchmarks.__main__._measured", None)
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_parts_of_an_update_are_told(capsys):
    parts.main(["--models", "mlp", "resnet50", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert printed.count(parts.WHOLE) == 2
    assert "average (6 of torch.float32)" in printed
    assert "copy (53 of torch.int64)" in printed
