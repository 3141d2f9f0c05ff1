"""Who decides whether a compression is good: the validator that a compressor was given, at all three levels."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loop_singular_bit import LoopCompressor, QualityValidator
from loop_singular_bit.cli import EXIT_OK, EXIT_QUALITY, EXIT_USAGE, main
from loop_singular_bit.language_model_evaluation import LanguageModelEvaluation

transformers = pytest.importorskip("transformers")

# b1 and b2 without calibration are what is wanted here: models that are damaged.
pytestmark = pytest.mark.filterwarnings("ignore::loop_singular_bit.quantization.presets.UncalibratedWarning")

EXAMPLES = Path(__file__).parents[1] / "examples"
BOOKS = EXAMPLES / "books-llama-7m"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny random model that one bit per weight ruins, and a text."""
    base = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, bos_token_id=0, eos_token_id=1, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BOOKS / name, base / "source")
    text = (EXAMPLES / "text/held_out/h-g-wells_the-time-machine.txt").read_text(encoding="utf-8")[5000:7000]
    return SimpleNamespace(source=base / "source", text=text, base=base)


def compressed(inputs: SimpleNamespace, preset: str, **options: Any) -> LoopCompressor:
    compressor = LoopCompressor(preset=preset, target_ram_mb=None, force=True, **options)
    output = inputs.base / f"{preset}-{len(list(inputs.base.iterdir()))}"
    compressor.compress_model(inputs.source, output, evaluate_text=inputs.text)
    return compressor


class ByDivergence(QualityValidator):
    """A user's validator: another verdict at each level, which the arguments of the class do not know."""

    seen = 0

    def passes(self, evaluation: LanguageModelEvaluation) -> bool | str:
        self.seen += 1
        return evaluation.kl_divergence < 1.5

    def weight_passes(self, figures: Mapping[str, Any]) -> bool | str:
        return figures["sqnr_db"] > 12


def test_a_bad_compression_is_refused_and_a_good_one_is_not(inputs: SimpleNamespace) -> None:
    bad, good = (compressed(inputs, preset, quality_threshold=25.0) for preset in ("b1", "b4"))
    increases = [one.results["compression_summary"]["average_quality_loss_percent"] for one in (bad, good)]
    divergences = [one.results["evaluation"]["kl_divergence"] for one in (bad, good)]
    assert divergences[0] > 10 * divergences[1]
    validation = good.validate_compression()
    assert validation["passed"] and validation["quality"]["status"] == "pass"
    assert validation["quality"]["measured"] == increases[1]
    assert validation["weights"]["status"] == validation["layers"]["status"] == "not evaluated"

    # The same two results before other judges.
    by_divergence = QualityValidator(1e9, max_kl_divergence=sum(divergences) / 2)
    by_weights = QualityValidator(1e9, max_relative_error=0.25)
    for validator, level in ((by_divergence, "quality"), (by_weights, "weights"), (ByDivergence(0.0), "quality")):
        bad.validator = good.validator = validator
        assert not bad.validate_compression()["passed"], level
        assert bad.validate_compression()[level]["status"] == "fail"
        assert good.validate_compression()["passed"], level
        assert good.validate_compression()[level]["status"] == "pass"
    assert ByDivergence.seen == 0 and good.validator.seen > 0
    assert bad.validate_compression()["weights"]["status"] == "fail"
    good.validator = QualityValidator(1e9, max_kl_divergence=divergences[1] / 2)
    quality = good.validate_compression()["quality"]
    assert quality["status"] == "fail" and quality["measured"] == divergences[1]


def test_the_validator_of_the_compressor_evaluates(inputs: SimpleNamespace) -> None:
    class Counting(QualityValidator):
        calls = 0

        def validate_model(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            Counting.calls += 1
            return super().validate_model(*arguments, **options, max_tokens=50)

    compressor = compressed(inputs, "b4", validator=Counting(7.0))
    assert Counting.calls == 1
    assert compressor.results["evaluation"]["tokens"] == 50
    assert compressor.quality_threshold == 7.0
    assert LoopCompressor().quality_threshold == 1.0
    with pytest.raises(ValueError, match="quality_threshold"):
        LoopCompressor(quality_threshold=2.0, validator=QualityValidator())


def test_layers_are_judged_by_their_outputs_on_the_calibration_text(inputs: SimpleNamespace) -> None:
    from loop_singular_bit.calibrated_compression import Calibration, compress_calibrated

    results = compress_calibrated(
        inputs.source, inputs.base / "calibrated", [inputs.text], "b2", Calibration(window=32, max_windows=8)
    )
    errors = [linear["output_error"] for linear in results["calibration"]["linears"]]
    for limit, status in ((max(errors) * 1.01, "pass"), (max(errors) * 0.99, "fail")):
        check = QualityValidator(max_output_error=limit).validate_results(results)["layers"]
        assert (check["status"], check["measured"]) == (status, max(errors))


def test_the_command_fails_on_a_bad_compression(inputs: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    text = inputs.base / "text.txt"
    text.write_text(inputs.text, encoding="utf-8")
    output = inputs.base / "command"
    code = main(["compress", str(inputs.source), str(output), "--preset", "b1", "--force", "--evaluate-text", str(text),
                 "--quality-threshold", "1", "--target-ram-mb", "8000"])  # fmt: skip
    evaluated = capsys.readouterr()
    increase = float(evaluated.err.partition("quality target missed: ")[2].split()[0])
    assert code == EXIT_QUALITY and increase > 1


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        (["--max-kl-divergence", "1e9"], None),  # perplexity is not judged then
        (["--max-kl-divergence", "1e-9"], "quality target missed"),
        (["--min-top1-agreement", "1"], "quality target missed"),
        (["--max-kl-divergence", "1e9", "--quality-threshold", "1"], "percent increase of perplexity"),
        (["--max-kl-divergence", "1e9", "--max-relative-error", "0.01"], "weights target missed"),
    ],
)
def test_limits_of_the_command(
    inputs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: list[str], missed: str | None
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(inputs.text, encoding="utf-8")
    code = main(["compress", str(inputs.source), str(tmp_path / "packed"), "--preset", "b1", "--force",
                 "--evaluate-text", str(text), "--target-ram-mb", "8000", *limits])  # fmt: skip
    errors = capsys.readouterr().err
    assert code == (EXIT_OK if missed is None else EXIT_QUALITY)
    assert missed in errors if missed else "missed" not in errors


def test_limits_of_the_command_need_what_they_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limit, needed in (
        ("--max-kl-divergence", "--evaluate-text"),
        ("--min-top1-agreement", "--evaluate-text"),
        ("--max-output-error", "--calibration"),
    ):
        assert main(["compress", "nowhere", str(tmp_path / "packed"), limit, "0.5"]) == EXIT_USAGE
        assert needed in capsys.readouterr().err
