"""The native runtime: the same numbers as through Transformers, budgets, back ends, faults, text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from streamed_models import (  # noqa: E402
    MODELS,
    make_packed,
    native_logits,
    relative_difference,
    token_ids,
    transformers_logits,
    transformers_model,
)

from loop_singular_bit import LoopCompressor, PackedLayout, ops  # noqa: E402
from loop_singular_bit.errors import CheckpointError, MemoryBudgetExceeded  # noqa: E402
from loop_singular_bit.local_models import is_packed, resolve_model  # noqa: E402
from loop_singular_bit.streaming import (  # noqa: E402
    StreamingManager,
    get_system_info,
    list_models,
    load_compressed_model,
    run_plan,
)

ROOT = Path(__file__).parent.parent
BOOKS = ROOT / "examples" / "books-llama-7m"
BACK_ENDS = ("resident", "mmap", "direct")
PROMPT = "It was a bright morning, and"


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, packed."""
    directory = tmp_path_factory.mktemp("books") / "books-b2"
    LoopCompressor(target_ram_mb=None).compress_model(BOOKS, directory)
    return directory


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_packed(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


@pytest.fixture
def damaged(packed: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a packed model with changed tensors."""

    def change(edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        directory = tmp_path / "damaged"
        shutil.copytree(packed("llama"), directory)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, {"format": "pt"})
        return directory

    return change


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(packed: Callable[[str], Path], name: str) -> None:
    directory = packed(name)
    tokens = token_ids(40)
    expected = transformers_logits(transformers_model(directory, "exact"), tokens)
    prefill = load_compressed_model(directory, activation_precision="exact", cache_type="float32")
    assert relative_difference(native_logits(prefill, tokens), expected) < 3e-6
    # One token at a time: the route of decoding, and the cache.
    decode = load_compressed_model(directory, activation_precision="exact", cache_type="float32", prefill_tokens=1)
    assert relative_difference(native_logits(decode, tokens), expected) < 3e-6
    # Chunks that do not fit together with blocks of positions.
    chunks = load_compressed_model(directory, activation_precision="exact", cache_type="float32", prefill_tokens=11)
    assert relative_difference(native_logits(chunks, tokens), expected) < 3e-6


@pytest.mark.parametrize("name", ["llama-yarn", "llama-dynamic-rope", "llama-longrope"])
def test_generation_beyond_the_original_context_is_that_of_transformers(
    packed: Callable[[str], Path], name: str
) -> None:
    """Frequencies that change with the length change for the positions to come only: older keys stay."""
    model = transformers_model(packed(name), "exact")
    manager = load_compressed_model(packed(name), activation_precision="exact", cache_type="float32", context_length=64)
    tokens = token_ids(14)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens)),
            max_new_tokens=50,
            do_sample=False,
            eos_token_id=None,
        )
    assert list(manager.generate_tokens(tokens, 50)) == expected[0, len(tokens) :].tolist()
    # Keys of another length are not taken over: the answer is that of a fresh start.
    longer = [*tokens, *expected[0, len(tokens) : 40].tolist(), 3]
    fresh = load_compressed_model(packed(name), activation_precision="exact", cache_type="float32", context_length=64)
    assert list(manager.generate_tokens(longer, 8, {"reuse_cache": True})) == list(fresh.generate_tokens(longer, 8))


@pytest.mark.parametrize(("cache_type", "bound"), [("float16", 1e-3), ("int8", 3e-2)])
def test_smaller_caches_stay_close(packed: Callable[[str], Path], cache_type: str, bound: float) -> None:
    tokens = token_ids(40)
    exact = load_compressed_model(packed("qwen3"), activation_precision="exact", cache_type="float32")
    rounded = load_compressed_model(packed("qwen3"), activation_precision="exact", cache_type=cache_type)
    difference = relative_difference(native_logits(rounded, tokens), native_logits(exact, tokens))
    assert 0 < difference < bound


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_quantized_activations_differ_no_more_than_in_transformers(books: Path, precision: str) -> None:
    tokens = token_ids(48, 4000)
    exact = transformers_logits(transformers_model(books, "exact"), tokens)
    theirs = transformers_logits(transformers_model(books, precision), tokens)
    ours = native_logits(load_compressed_model(books, activation_precision=precision), tokens)
    assert relative_difference(ours, exact) < 1.2 * relative_difference(theirs, exact) + 2e-3


@pytest.mark.parametrize("cache_type", ["float32", "float16"])
def test_greedy_text_of_the_bundled_model_is_identical(books: Path, cache_type: str) -> None:
    model = transformers_model(books, "exact")
    manager = load_compressed_model(books, activation_precision="exact", cache_type=cache_type)
    tokens = manager.tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens)),
            max_new_tokens=200,
            do_sample=False,
            eos_token_id=None,
        )
    ours = list(manager.generate_tokens(tokens, 200))
    assert ours == expected[0, len(tokens) :].tolist()


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "llama-dense-embeddings"])
def test_back_ends_give_the_same_bits(packed: Callable[[str], Path], name: str) -> None:
    tokens = token_ids(20)
    expected = native_logits(load_compressed_model(packed(name), back_end="resident"), tokens)
    for back_end in ("mmap", "direct"):
        for prefetch in (True, False):
            manager = load_compressed_model(packed(name), back_end=back_end, prefetch_enabled=prefetch)
            assert manager.plan["back_end"] == back_end
            assert manager.plan["streamed_bytes"] == manager.plan["weight_bytes"]
            # Twice: the second pass starts from what was read ahead.
            assert torch.equal(native_logits(manager, tokens), expected)
            assert torch.equal(native_logits(manager, tokens), expected)
            assert list(manager.generate_tokens(tokens[:5], 4)) == list(manager.generate_tokens(tokens[:5], 4))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_linears_cut_into_units_give_the_same_bits(packed: Callable[[str], Path], layers: int) -> None:
    directory = packed("llama-large")
    tokens = token_ids(20)
    whole = load_compressed_model(directory, back_end="resident")
    expected = native_logits(whole, tokens)
    for back_end in ("mmap", "direct"):
        for prefetch in (True, False):
            manager = StreamingManager(directory, 2000, layers, prefetch_enabled=prefetch, back_end=back_end)
            assert manager.plan["units"] > whole.plan["units"]
            for _ in range(3):  # pinned units are pinned in the second pass
                assert torch.equal(native_logits(manager, tokens), expected)
            assert list(manager.generate_tokens(tokens, 8)) == list(whole.generate_tokens(tokens, 8))


def test_a_pass_that_was_interrupted_within_a_linear_is_begun_anew(packed: Callable[[str], Path]) -> None:
    directory = packed("llama-large")
    tokens = token_ids(20)
    expected = native_logits(load_compressed_model(directory), tokens)
    manager = StreamingManager(directory, None, 1, back_end="direct")
    weights = directory / "model.safetensors"
    original = weights.stat()
    for _ in range(4):
        # Readers notice that the file was touched wherever they are; afterwards it is as it was.
        timer = threading.Timer(0.003, os.utime, (weights,))
        timer.start()
        with pytest.raises(OSError, match="was changed while in use"):
            for _ in range(1000):
                manager.logits(tokens)
        timer.join()
        os.utime(weights, ns=(original.st_atime_ns, original.st_mtime_ns))
        assert torch.equal(native_logits(manager, tokens), expected)


def test_shards_are_read_like_one_file(books: Path, tmp_path: Path) -> None:
    LoopCompressor(target_ram_mb=None, max_shard_gb=0.0008).compress_model(BOOKS, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    tokens = token_ids(20)
    expected = native_logits(load_compressed_model(books), tokens)
    for back_end in BACK_ENDS:
        manager = load_compressed_model(tmp_path / "shards", back_end=back_end)
        assert torch.equal(native_logits(manager, tokens), expected)


def test_any_number_of_threads_gives_the_same_bits(books: Path) -> None:
    tokens = token_ids(50, 4000)
    one = native_logits(load_compressed_model(books, threads=1), tokens)
    assert torch.equal(native_logits(load_compressed_model(books, threads=3), tokens), one)


def test_tokens_out_of_range_are_refused(packed: Callable[[str], Path]) -> None:
    manager = load_compressed_model(packed("llama"))
    with pytest.raises(ValueError, match="expected 0 to 1055, got 1056 at 1"):
        manager.logits([0, 1056])
    with pytest.raises(ValueError, match="do not fit into 128"):
        manager.logits([0] * 129)
    with pytest.raises(ValueError, match="leave no room in a context of 128"):
        list(manager.generate_tokens([0] * 128, 1))


def packed_nbytes(module: str, directory: Path) -> int:
    fields = json.loads((directory / "config.json").read_text())["quantization_config"]["modules"][module]
    return PackedLayout.from_dict(fields).nbytes


# ---- budget --------------------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_met_is_refused_with_numbers(books: Path) -> None:
    with pytest.raises(
        MemoryBudgetExceeded, match=r"a budget of 5\.0 MB cannot be met.*keys and values.*weights"
    ) as why:
        StreamingManager(books, target_ram_mb=5)
    assert why.value.target_mb == 5
    assert why.value.needed_mb > 5
    # The figure that the refusal names is enough, but for what this process has grown since.
    assert run_plan(books, why.value.needed_mb + 5)["total_bytes"] <= (why.value.needed_mb + 5) * 1e6


def test_max_layers_in_ram_limits_the_weights_in_memory(books: Path) -> None:
    def weights(plan: dict) -> int:
        return sum(line["bytes"] for line in plan["lines"] if line["name"].startswith("weights"))

    unlimited = run_plan(books, 2000)
    assert unlimited["back_end"] == "resident"
    one = run_plan(books, 2000, max_layers_in_ram=1)
    assert one["back_end"] != "resident"
    three = run_plan(books, 2000, max_layers_in_ram=3)
    layer_bytes = (unlimited["weight_bytes"] - packed_nbytes("model.embed_tokens", books)) / 8
    # A row tile of the head is larger than half a layer here, and the least that can be read.
    assert weights(one) <= layer_bytes + 40_000
    assert weights(one) < weights(three) <= 3 * layer_bytes
    assert three["pinned_units"] > one["pinned_units"]
    assert three["streamed_bytes"] < one["streamed_bytes"] <= unlimited["weight_bytes"]


def test_spare_budget_pins_the_first_units(books: Path) -> None:
    with pytest.raises(MemoryBudgetExceeded) as why:
        run_plan(books, 5, back_end="direct")
    # The chunk is fixed, or a larger budget would be spent on longer ones first.
    plans = [
        run_plan(books, why.value.needed_mb + spare, back_end="direct", prefill_tokens=1) for spare in (6, 7.5, 40)
    ]
    pinned = [plan["pinned_units"] for plan in plans]
    assert pinned == sorted(pinned)
    assert pinned[-1] == plans[-1]["units"]
    assert plans[-1]["streamed_bytes"] == 0
    for plan in plans:
        assert sum(line["bytes"] for line in plan["lines"]) == plan["total_bytes"] <= plan["budget_bytes"]


def test_pinned_units_are_read_once(books: Path) -> None:
    manager = StreamingManager(books, target_ram_mb=2000, max_layers_in_ram=4, back_end="direct")
    assert 0 < manager.plan["pinned_units"] < manager.plan["units"]
    list(manager.generate_tokens([5, 6], 1))
    first = manager.statistics()["bytes_read"]
    list(manager.generate_tokens([5, 6], 10))
    per_token = (manager.statistics()["bytes_read"] - first) / 10
    assert manager.plan["streamed_bytes"] <= per_token < 2 * manager.plan["streamed_bytes"]


def test_a_process_that_outgrows_the_budget_is_told(books: Path) -> None:
    with pytest.raises(MemoryBudgetExceeded) as why:
        run_plan(books, 5, max_layers_in_ram=1)
    # This process has torch, and a peak of its own.
    peak = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1]) / 1000
    budget = max(why.value.needed_mb, peak) + 40
    manager = StreamingManager(books, target_ram_mb=budget)
    manager.generate(PROMPT, 2)
    ballast = bytearray(int((budget + 10) * 1e6))
    for page in range(0, len(ballast), 4096):
        ballast[page] = 1
    with pytest.raises(MemoryBudgetExceeded, match="above the budget"):
        manager.generate(PROMPT, 2)


CLEAN = """
import json, sys
from loop_singular_bit.streaming import StreamingManager
manager = StreamingManager({directory!r}, target_ram_mb={budget}, back_end={back_end!r}, max_layers_in_ram=None)
text = manager.generate({prompt!r}, 60)
assert "torch" not in sys.modules and "numpy" not in sys.modules and "transformers" not in sys.modules
print(json.dumps({{"text": text, "plan": manager.plan, **manager.last_run}}))
"""


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_process_without_torch_stays_within_its_budget(books: Path, back_end: str) -> None:
    program = CLEAN.format(directory=str(books), budget=55, back_end=back_end, prompt=PROMPT)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["new_tokens"] == 60
    assert result["peak_resident_mb"] <= 55
    assert result["plan"]["total_bytes"] <= 55e6


@pytest.mark.parametrize("isa", ops.supported_isas())
def test_every_instruction_set_writes_the_same_text(books: Path, isa: str) -> None:
    program = (
        "from loop_singular_bit import load_compressed_model\n"
        f"manager = load_compressed_model({str(books)!r}, activation_precision='exact')\n"
        f"print(manager.generate({PROMPT!r}, 25))"
    )
    environment = {**os.environ, "LOOP_SINGULAR_BIT_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    expected = load_compressed_model(books, activation_precision="exact").generate(PROMPT, 25)
    assert done.stdout == expected + "\n", done.stderr


def test_the_program_without_python_chooses_the_same_tokens(books: Path) -> None:
    programs = sorted(ROOT.glob("build*/**/generate_tokens"), key=lambda path: path.stat().st_mtime)
    if not programs:
        pytest.skip("examples/generate_tokens.cpp was not built")
    done = subprocess.run([programs[-1], books, "40", "8", "5", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = [int(line) for line in done.stdout.split()]
    assert tokens == list(load_compressed_model(books).generate_tokens([5, 6], 8))
    refused = subprocess.run([programs[-1], books, "3", "8", "5"], capture_output=True, text=True)
    assert refused.returncode == 1 and "cannot be met" in refused.stderr


# ---- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back_end", ["mmap", "direct"])
def test_a_file_that_is_cut_short_while_in_use_stops_generation(books: Path, tmp_path: Path, back_end: str) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(books, directory)
    manager = load_compressed_model(directory, back_end=back_end)
    tokens = manager.generate_tokens([5, 6], 50)
    next(tokens)
    os.truncate(directory / "model.safetensors", 1_000_000)
    with pytest.raises(OSError, match=r"model\.safetensors: (had|ends before|reading)"):
        list(tokens)


@pytest.mark.parametrize("back_end", ["mmap", "direct"])
def test_a_file_that_is_rewritten_while_in_use_stops_generation(books: Path, tmp_path: Path, back_end: str) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(books, directory)
    manager = load_compressed_model(directory, back_end=back_end)
    tokens = manager.generate_tokens([5, 6], 50)
    next(tokens)
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"\x55" * 4096)
    with pytest.raises(OSError, match="was changed while in use"):
        list(tokens)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_scales_that_are_not_finite_are_found_before_use(damaged: Callable[..., Path], back_end: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.scales"][0, 0, 3] = float("nan")

    manager = load_compressed_model(damaged(edit), back_end=back_end)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.scales: expected finite.*at row 3"):
        manager.logits([1, 2, 3])


def test_outlier_columns_out_of_range_are_found_before_use(damaged: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        columns = tensors["model.layers.0.mlp.down_proj.outlier_columns"].view(torch.int16)
        columns[1, 0, 4] = 96

    with pytest.raises(CheckpointError, match=r"outlier_columns: expected columns below 96, got 96 at row 36"):
        load_compressed_model(damaged(edit)).logits([1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.signs"), "model.layers.1.mlp.up_proj.signs is missing"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.zeros(3)}), "model.extra is not part of a llama model"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(63)}),
            r"model.norm.weight: expected shape \[64\], got \[63\]",
        ),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), "model.norm.weight: expected finite values"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    damaged: Callable[..., Path], edit: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_compressed_model(damaged(edit))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, 'runs llama, mistral, qwen2 and qwen3, not "gpt2"'),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
        ({"rope_parameters": {"rope_type": "proportional"}}, 'dynamic or longrope, got "proportional"'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -2.0}}, "factor: expected a positive number, got -2"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}},
            "short_factor: expected 8 numbers, one per pair, got 1",
        ),
        ({"hidden_size": -1}, "hidden_size: expected an integer from 1"),
        ({"vocab_size": 1 << 60}, "vocab_size: expected an integer from 1"),
        ({"quantization_config": None}, "no quantization_config"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(
    packed: Callable[[str], Path], tmp_path: Path, change: dict, message: str
) -> None:
    shutil.copytree(packed("llama"), tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_compressed_model(tmp_path / "copy")


def test_a_shard_outside_of_the_directory_is_refused(packed: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(packed("llama"), directory)
    (directory / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected the name of a file in the same directory"):
        load_compressed_model(directory)


def test_checksums_are_verified_on_request(books: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(books, directory)
    StreamingManager(directory, None, verify_checksums=True).close()
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(2_000_000)
        byte = file.read(1)
        file.seek(2_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match="expected the SHA-256"):
        StreamingManager(directory, None, verify_checksums=True)


def test_a_signal_interrupts_native_code(books: Path) -> None:
    manager = load_compressed_model(books, threads=1)
    tokens = manager.tokenizer.encode(PROMPT) * 60
    # A shell starts its background jobs with SIGINT ignored, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(1000):
                manager.logits(tokens[:900])
    finally:
        signal.signal(signal.SIGINT, before)
    # The model is as usable as before.
    assert len(list(manager.generate_tokens(tokens[:9], 3))) == 3


def test_a_signal_whose_handler_returns_does_not_interrupt(books: Path) -> None:
    manager = load_compressed_model(books, threads=1)
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        timer = threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        timer.start()
        deadline = time.monotonic() + 20
        expected = list(manager.generate_tokens([5, 6], 20))
        while not seen and time.monotonic() < deadline:
            assert list(manager.generate_tokens([5, 6], 20)) == expected
        assert seen
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---- text ----------------------------------------------------------------------------------------------------------


def test_sampling_follows_its_seed(books: Path) -> None:
    manager = load_compressed_model(books)
    texts = [manager.generate(PROMPT, 30, temperature=0.9, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = manager.generate(PROMPT, 30)
    assert manager.generate(PROMPT, 30, temperature=0.9, top_k=1) == greedy
    assert manager.generate(PROMPT, 30, temperature=0.9, top_p=1e-6) == greedy
    assert "".join(manager.stream(PROMPT, 30)) == greedy


def test_repetition_penalty_is_that_of_transformers(books: Path) -> None:
    manager = load_compressed_model(books, activation_precision="exact", cache_type="float32")
    tokens = manager.tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = transformers_model(books, "exact").generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens)),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=1.3,
        )
    ours = list(manager.generate_tokens(tokens, 40, {"repetition_penalty": 1.3}))
    assert ours == expected[0, len(tokens) :].tolist()[: len(ours)]
    assert ours != list(manager.generate_tokens(tokens, 40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature: expected at least 0"),
        ({"top_p": 0.0}, "top_p: expected more than 0"),
        ({"top_k": -1}, "top_k: expected at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected more than 0"),
        ({"stop": ("",)}, "stop: expected strings that are not empty"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
    ],
)
def test_sampling_options_out_of_range_are_refused(books: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_compressed_model(books).generate(PROMPT, **{"max_new_tokens": 2, **arguments})


def test_text_stops_before_a_stop_string(books: Path) -> None:
    manager = load_compressed_model(books)
    whole = manager.generate(PROMPT, 40)
    stop = whole[15:22]
    assert manager.generate(PROMPT, 40, stop=stop) == whole[: whole.index(stop)]
    assert manager.last_run["finish_reason"] == "stop"
    assert manager.generate(PROMPT, 40, stop=["never in it"]) == whole
    assert manager.last_run["finish_reason"] == "length"


def test_text_ends_at_an_end_token(books: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(books, directory)
    manager = load_compressed_model(directory)
    prompt = manager.tokenizer.encode(PROMPT)
    tokens = list(manager.generate_tokens(prompt, 20))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [4000, tokens[7]]}))
    again = load_compressed_model(directory)
    assert list(again.generate_tokens(prompt, 20)) == tokens[: tokens.index(tokens[7])]
    assert again.last_run["finish_reason"] == "end"


def test_a_shared_beginning_is_not_computed_again(books: Path) -> None:
    manager = load_compressed_model(books, activation_precision="exact", cache_type="float32", back_end="direct")
    tokens = manager.tokenizer.encode(PROMPT)
    first = list(manager.generate_tokens(tokens, 10))
    longer = [*tokens, *first, 7, 8]
    expected = list(manager.generate_tokens(longer, 10))
    list(manager.generate_tokens(tokens, 10))
    read = manager.statistics()["bytes_read"]
    assert list(manager.generate_tokens(longer, 10, {"reuse_cache": True})) == expected
    assert manager.statistics()["bytes_read"] - read < 13 * manager.plan["weight_bytes"]


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chat_template_is_that_of_transformers(books: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(books, directory)
    with pytest.raises(CheckpointError, match="has no chat template"):
        load_compressed_model(directory).tokenizer.chat_prompt([{"role": "user", "content": "Hello"}])
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    manager = load_compressed_model(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert manager.tokenizer.chat_prompt(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


# ---- names and the machine -----------------------------------------------------------------------------------------


def test_names_resolve_to_directories_and_to_the_cache(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--books" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(books, snapshot)
    assert load_compressed_model("someone/books").directory == snapshot
    found = {model["name"]: model for model in list_models([books.parent])}
    assert found["someone/books"]["path"] == str(snapshot)
    assert found[str(books)]["preset"] == "b2"
    assert found[str(books)]["bytes"] == (books / "model.safetensors").stat().st_size
    with pytest.raises(CheckpointError, match="no such directory"):
        load_compressed_model("not there")


@pytest.fixture
def hub(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache, and a Hub that has one model; what was fetched from it."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    fetched: list[str] = []

    def snapshot(name: str) -> Path:
        if name != "someone/books":
            raise LocalEntryNotFoundError(f"404: {name}")
        directory = cache / "models--someone--books" / "snapshots" / "abc"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def hf_hub_download(name: str, file: str) -> str:
        path = snapshot(name) / file
        shutil.copy(books / file, path)
        fetched.append(file)
        return str(path)

    def snapshot_download(name: str) -> str:
        directory = snapshot(name)
        shutil.copytree(books, directory, dirs_exist_ok=True)
        fetched.append("all")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


def test_a_model_comes_from_the_hub_once(hub: list[str]) -> None:
    text = load_compressed_model("someone/books").generate(PROMPT, 4)
    assert load_compressed_model("someone/books").generate(PROMPT, 4) == text
    assert hub == ["all"]
    with pytest.raises(CheckpointError, match="nobody/none: no such directory, and not to be had from the Hub: 404"):
        load_compressed_model("nobody/none")


def test_whether_a_model_on_the_hub_is_packed_takes_its_configuration_only(hub: list[str]) -> None:
    assert is_packed("someone/books")
    assert hub == ["config.json"]
    # Half a snapshot is not taken for a model.
    assert list_models([]) == []
    assert load_compressed_model("someone/books").directory.name == "abc"
    assert hub == ["config.json", "all"]
    assert [model["name"] for model in list_models([])] == ["someone/books"]
    assert is_packed("someone/books") and hub == ["config.json", "all"]


def test_shards_of_a_cached_model_may_be_missing(books: Path, hub: list[str], tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--someone--books" / "snapshots" / "abc"
    LoopCompressor(target_ram_mb=None, max_shard_gb=0.0008).compress_model(BOOKS, snapshot)
    assert resolve_model("someone/books") == snapshot and hub == []
    sorted(snapshot.glob("*.safetensors"))[1].unlink()
    resolve_model("someone/books")
    assert hub == ["all"]


def test_without_the_hub_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        load_compressed_model("someone/books")


def test_system_info_says_what_budget_runs_what(books: Path) -> None:
    info = get_system_info(books)
    assert info["isa"] in info["supported_isas"]
    assert info["disk_read_mb_per_second"] > 0
    (budgets,) = info["models"]
    assert 0 < budgets["smallest_budget_mb"] < budgets["resident_budget_mb"]
