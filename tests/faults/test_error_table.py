"""Bad input, as one table: each case ends with exit status 2, says what is wrong, shows no traceback, writes nothing."""

import json
import shutil

import pytest

import klimb.target
from klimb.config.kinds import PYTHON_ONLY
from klimb.store import list_checkpoints

CHAT = [{"role": "user", "content": "write a review"}]

DATA = {
    "learn_from": "data",
    "method": "dpo",
    "kl_budget": None,
    "num_plan_draws": 40,
    "num_generations": None,
    "num_replay": None,
}
ROW = {"prompt": "review", "split": "train"}
JUDGED = {
    kind: [{**ROW, **row}, {**ROW, **row, "split": "test"}]
    for kind, row in {
        "pairs": {"chosen": "good", "rejected": "bad"},
        "same": {"chosen": "good", "rejected": "good"},
        "unpaired": {"completion": "good", "label": True},
        "alone": {"completion": "good"},
        "prompts": {"thing": "good"},
        "misspelt": {"chsen": "good", "rejected": "bad"},
    }.items()
}
TAUGHT = {
    **{"reward_funcs": [], "kl_budget": None, "num_replay": 0, "method": "distill"},
    "target.context": "very good kind warm",
}
"""a run whose target is a policy"""
TEACHER = {**{name: x for name, x in TAUGHT.items() if name != "target.context"}, "target.kind": "teacher"}

# name, options that change, what is done to the files of the test's folder, words that the message must hold
CASES = [
    ("misspelt option", {"learning_rat": 1}, None, ["--learning_rat", "did you mean '--learning_rate'"]),
    ("misspelt nested option", {"family.alfa": 1}, None, ["--family.alfa", "--family.alpha"]),
    ("not a number", {"learning_rate": "fast"}, None, ["learning_rate", "'fast'"]),
    ("two bad values", {"learning_rate": -1, "max_steps": "x"}, None, ["learning_rate", "max_steps"]),
    ("beta negative", {"kl_budget": None, "beta": -1}, None, ["beta", "'-1'", "positive"]),
    ("beta NaN", {"kl_budget": None, "beta": "nan"}, None, ["beta", "nan", "positive"]),
    ("beta 0", {"kl_budget": None, "beta": 0}, None, ["beta 0 has no target", "kl_budget"]),
    ("beta and kl_budget", {"beta": 0.1}, None, ["beta 0.1 and kl_budget 0.5", "expected one of"]),
    (
        "unknown target",
        {"target.kind": "tilted"},
        None,
        ["target.kind", "'tilted'", "entropy_bonus", "length_normalized"],
    ),
    *(
        (
            f"target in Python: {kind}",
            {"target.kind": kind},
            None,
            [kind, f"in Python only: klimb.target.{name}"],
        )
        for kind, name in PYTHON_ONLY.items()
    ),
    (
        "an entropy bonus and a budget",
        {"target.kind": "entropy_bonus", "target.bonus": 0.1},
        None,
        ["entropy_bonus", "got kl_budget 0.5", "expected a beta"],
    ),
    (
        "an entropy bonus and a goal",
        {"target.kind": "entropy_bonus", "target.bonus": 0.1, "kl_budget": None, "reward_goal": 0.4},
        None,
        ["entropy_bonus", "got reward_goal 0.4", "expected a beta"],
    ),
    ("a bonus for the tilt", {"target.bonus": 0.1}, None, ["target.bonus does not go with target.kind tilt"]),
    (
        "a threshold of another reward",
        {"target.kind": "length_normalized", "method": "filtered", "num_replay": 0},
        None,
        ["filtered", "length_normalized"],
    ),
    (
        "budget and few draws",
        {"num_plan_draws": 16, "kl_budget": 3},
        None,
        ["245 draws", "num_plan_draws is 16"],
    ),
    (
        "goal out of reach",
        {"kl_budget": None, "reward_goal": 9},
        None,
        ["reward_goal 9 is out of reach", "the reference"],
    ),
    (
        "goal past the pool",
        {"kl_budget": None, "reward_goal": 0.85},
        None,
        ["reward_goal 0.85: got 32 draws", "KL of", "needs about"],
    ),
    ("one draw", {"num_generations": 1, "num_replay": 0}, None, ["num_generations 1", "at least 2"]),
    ("replay past the pool", {"num_replay": 33}, None, ["33", "num_plan_draws is 32"]),
    ("too many prompts a step", {"prompts_per_step": 17}, None, ["prompts_per_step 17", "16 prompts"]),
    ("unknown method", {"method": "log_varianc"}, None, ["method", "did you mean 'log_variance'"]),
    ("a method that draws", {"method": "best_of"}, None, ["trains nothing", "klimb sample"]),
    ("its own draws", {"method": "sft"}, None, ["it learns nothing"]),
    (
        "a reward model of draws",
        {"method": "reward_model"},
        None,
        ["reward_model learns from completions that somebody compared", "use learn_from data"],
    ),
    (
        "a reward model that draws",
        {"method": "reward_model", "learn_from": "data"},
        None,
        ["reward_model has no use for", "reward_funcs", "num_generations", "max_completion_length"],
    ),
    ("margins of a policy", {"judge": "margins"}, None, ["judge margins is of method reward_model"]),
    (
        "a centre of a policy",
        {"center_rewards_coefficient": 1},
        None,
        ["is of method reward_model, got log_variance"],
    ),
    ("replay for ppo", {"method": "ppo", "num_replay": 4}, None, ["fresh draws alone", "num_replay 4"]),
    ("a value head without ppo", {"gae_lambda": 0.9}, None, ["gae_lambda", "no critic", "ppo"]),
    ("log Z for nobody", {"log_z": "running"}, None, ["log_z running", "log_variance asks for no log Z"]),
    (
        "log Z of elsewhere",
        {"log_z": "lerned"},
        None,
        ["log_z", "'lerned'", "'plan', 'running' or 'learned'"],
    ),
    (
        "a log Z that has no gradient",
        {"log_z": "learned", "method": "jensen_shannon"},
        None,
        ["log_z learned", "jensen_shannon has no gradient", "trajectory_balance"],
    ),
    (
        "a rate for nobody",
        {"method": "trajectory_balance", "log_z_learning_rate": 0.5},
        None,
        ["log_z_learning_rate", "log_z is plan", "log_z learned"],
    ),
    (
        "a penalty nobody has",
        {"method": "grpo", "kl_penalty": "k4_as_loss"},
        None,
        ["kl_penalty", "k4_as_loss", "k3_as_loss"],
    ),
    (
        "a controller for a method of one beta",
        {"kl_target": 0.5, "method": "jensen_shannon"},
        None,
        ["kl_target moves beta", "jensen_shannon needs log Z"],
    ),
    (
        "a controller of a made-up beta",
        {
            "kl_target": 0.5,
            "target.kind": "entropy_bonus",
            "target.bonus": 0.1,
            "beta": 0.1,
            "kl_budget": None,
        },
        None,
        ["kl_target moves beta", "entropy_bonus"],
    ),
    (
        "a controller that sees no draws",
        {"kl_target": 0.5, "num_generations": 0, "replay_steps": 24},
        None,
        ["fresh draws"],
    ),
    ("a horizon of one step", {"kl_target": 0.5, "kl_horizon": 2}, None, ["kl_horizon 2", "too short"]),
    ("a horizon for nobody", {"kl_horizon": 2}, None, ["kl_horizon", "kl_target"]),
    (
        "other prompts where all are of use",
        {"dynamic_sampling": 2},
        None,
        ["dynamic_sampling", "log_variance learns from those too", "grpo"],
    ),
    ("epsilon without a ratio", {"epsilon": 0.2}, None, ["epsilon", "does not clip"]),
    (
        "minibatches of less than a prompt",
        {"num_minibatches": 64},
        None,
        ["num_minibatches 64", "prompts_per_step"],
    ),
    (
        "another name of it",
        {"activation_checkpointing": True},
        None,
        ["did you mean '--gradient_checkpointing'"],
    ),
    (
        "a prefix that would be written twice",
        {"family.kind": "prefix", "gradient_checkpointing": True},
        None,
        ["gradient_checkpointing", "family.kind prefix", "soft_prompt"],
    ),
    (
        "4 bits on a CPU",
        {"dtype": "nf4"},
        None,
        ["dtype nf4", "got the device cpu", "expected a GPU with CUDA"],
    ),
    *(
        (
            f"4 bits and {name}",
            {"dtype": "nf4", **changes},
            None,
            ["dtype nf4 is of frozen weights", f"got {name}"],
        )
        for name, changes in {
            "family.kind full": {"family.kind": "full"},
            "shard": {"shard": True},
            "sampler.kind vllm": {"sampler.url": "http://localhost:1"},
            "method reward_model": {"method": "reward_model"},
        }.items()
    ),
    ("a device that is none", {"device": "gpu"}, None, ["device: got 'gpu'", "expected one of cpu"]),
    (
        "a card that is not there",
        {"device": "cuda:77"},
        None,
        ["device: got 'cuda:77'", "expected one of cpu"],
    ),
    ("a folder below a file", {"output_dir": "rewards.py/x"}, None, ["rewards.py is a file"]),
    ("a folder without a name", {"output_dir": ""}, None, ["output_dir: got ''"]),
    ("data without a name", {"dataset_name": ""}, None, ["dataset_name: got ''"]),
    ("a seed of too many digits", {"seed": 10**30}, None, ["seed", "expected a number less than"]),
    (
        "a layer that is not there, beside one that is",
        {"family.target_modules": ["q_proj", "v_porj"]},
        None,
        ["no layer is called 'v_porj'", "did you mean 'v_proj'"],
    ),
    ("a template that refuses", {}, "refuses", ["the chat template", "refuses the prompt", "no reviews"]),
    ("a class for a reward", {"reward_funcs": "rewards.py:Kind"}, None, ["got a class, expected a function"]),
    ("a law and a budget", {**TAUGHT, "kl_budget": 0.5}, None, ["got kl_budget 0.5", "--kl_budget null"]),
    (
        "data of a folder without any",
        {"dataset_name": "none"},
        "folder",
        ["none: datasets cannot read this folder", ".jsonl"],
    ),
    ("unknown tracker", {"report_to": "wandbb"}, None, ["report_to", "wandbb"]),
    ("no such model", {"model_name_or_path": "./nowhere"}, None, ["./nowhere"]),
    ("no such reference", {"reference": "./nowhere"}, None, ["./nowhere"]),
    ("no such adapter", {"family.start": "./nowhere"}, None, ["nowhere", "adapter_config.json"]),
    ("model without weights", {}, "no_weights", ["model", "safetensors"]),
    ("model without an end", {}, "no_end", ["end-of-sequence"]),
    ("other tokenizer", {}, "other_words", ["reference", "same tokenizer"]),
    ("no such file", {"dataset_name": "prompt.jsonl"}, None, ["prompt.jsonl"]),
    ("no such split", {"dataset_test_split": "tset"}, None, ["tset", "did you mean 'test'"]),
    ("no such column", {"prompt_column": "promt"}, None, ["promt", "did you mean 'prompt'"]),
    ("empty data", {}, "", ["empty"]),
    ("empty prompt", {}, [{"prompt": " ", "split": "train"}], ["line 1", "prompt is empty"]),
    ("prompt past the context", {}, "long", ["tokens", "context of 64"]),
    ("no such reward", {"reward_funcs": "rewards.py:god"}, None, ["god", "did you mean 'good'"]),
    ("reward of one length", {"reward_funcs": "rewards.py:short"}, None, ["short", "got 1 values"]),
    ("reward of strings", {"reward_funcs": "rewards.py:words"}, None, ["words", "expected a number"]),
    ("reward NaN", {"reward_funcs": "rewards.py:nan"}, None, ["nan", "prompt:", "completion:"]),
    (
        "reward fails",
        {"reward_funcs": "rewards.py:fails"},
        None,
        ["ZeroDivisionError", "rewards.py", "prompt:"],
    ),
    ("reward always the same", {"reward_funcs": "rewards.py:same"}, None, ["nothing can be learned"]),
    ("reward without a name", {"reward_funcs": [{"fun": "exact"}]}, None, ["reward_funcs", "{func: NAME}"]),
    (
        "reward without its option",
        {"reward_funcs": "regex"},
        None,
        ["reward regex", "needs the option pattern"],
    ),
    (
        "misspelt option of a reward",
        {"reward_funcs": [{"func": "length", "traget": 3}]},
        None,
        ["'traget'", "did you mean 'target'"],
    ),
    (
        "option of a reward of another kind",
        {"reward_funcs": [{"func": "length", "target": "x"}]},
        None,
        ["option target", "got 'x'"],
    ),
    (
        "misspelt option of one's own reward",
        {"reward_funcs": [{"func": "rewards.py:same", "completion_ids": 3}]},
        None,
        ["completion_ids", "kept for what is drawn"],
    ),
    ("misspelt name of a reward", {"reward_funcs": "exactt"}, None, ["exactt", "did you mean 'exact'"]),
    (
        "reward of a column that is not there",
        {"reward_funcs": "exact"},
        None,
        ["reward exact", "'answer'", "no column of the data"],
    ),
    (
        "rules that are none",
        {"reward_funcs": [{"func": "constraints", "rules": {"word": 3}}]},
        None,
        ["'word'", "did you mean 'words'"],
    ),
    (
        "secret that is not set",
        {
            "reward_funcs": [
                {"func": "http", "url": "http://localhost:1", "headers_env": {"A": "KLIMB_NO_SUCH"}}
            ]
        },
        None,
        ["KLIMB_NO_SUCH", "not set"],
    ),
    (
        "cache that is none",
        {"reward_cache": "rewards.py"},
        None,
        ["reward_cache", "rewards.py", "no cache of rewards"],
    ),
    (
        "puzzles of no task",
        {"dataset_name": "reasoning_gym:chain_sums"},
        None,
        ["chain_sums", "did you mean 'chain_sum'|not installed"],
    ),
    *(
        (f"data: {name}", {**DATA, **changes}, JUDGED[kind], words)
        for name, kind, changes, words in [
            (
                "a method that needs the law",
                "pairs",
                {"method": "reverse_kl"},
                ["needs the law that drew the completions"],
            ),
            ("a method of fresh draws", "pairs", {"method": "grpo"}, ["use one of log_variance"]),
            ("one completion a row for dpo", "unpaired", {}, ["use kto or bco where they are labelled"]),
            ("completions alone for dpo", "alone", {"judge": "scores"}, ["has one a row"]),
            (
                "draws beside it",
                "pairs",
                {"num_generations": 4},
                ["learn_from data draws nothing to learn from"],
            ),
            ("a budget", "pairs", {"kl_budget": 1}, ["no plan finds a beta", "give a beta"]),
            (
                "smoothing of a square",
                "pairs",
                {"method": "ipo", "label_smoothing": 0.1},
                ["ipo has no logistic"],
            ),
            ("scores for kto", "pairs", {"method": "kto", "judge": "scores"}, ["kto compares nothing"]),
            (
                "scores that are not there",
                "pairs",
                {"judge": "scores"},
                ["no scores of these pairs", "score_chosen"],
            ),
            (
                "another target",
                "pairs",
                {"target.kind": "length_normalized"},
                ["length_normalized", "expected tilt"],
            ),
            ("an evaluation in between", "pairs", {"eval_steps": 2}, ["no evaluation in between"]),
            (
                "no such split",
                "pairs",
                {"dataset_test_split": "tset"},
                ["no split 'tset'", "did you mean 'test'"],
            ),
            ("the same twice", "same", {}, ["line 1", "chosen and rejected are the same"]),
            ("prompts alone", "prompts", {}, ["no judged completions", "expected chosen and rejected"]),
            ("a misspelt column", "misspelt", {}, ["did you mean 'chosen'"]),
            (
                "f_dpo without its f",
                "pairs",
                {"method": "f_dpo"},
                ["something in brackets", "f_dpo(jensen_shannon)"],
            ),
            ("f_dpo of none", "pairs", {"method": "f_dpo(jenson)"}, ["did you mean jensen_shannon"]),
            (
                "f_dpo of a slope that ends",
                "pairs",
                {"method": "f_dpo(total_variation)"},
                ["f_dpo(total_variation)", "may leave completions out"],
            ),
        ]
    ),
    (
        "labels of draws",
        {"label_smoothing": 0.1},
        None,
        ["label_smoothing is about completions of data"],
    ),
    ("divergence misspelt", {**TAUGHT, "divergence": "forwardkl"}, None, ["did you mean forward_kl"]),
    ("beta of a law", {**TAUGHT, "beta": 0.5}, None, ["is a law already", "beta is 1"]),
    ("reward of a law", {**TAUGHT, "reward_funcs": ["exact"]}, None, ["is a law already", "no reward_funcs"]),
    ("replay of a lesson", {**TAUGHT, "num_replay": 4}, None, ["from nothing kept", "num_replay"]),
    ("a lesson of no draws", {**TAUGHT, "num_generations": 0}, None, ["one or more"]),
    ("a context of nothing", {**TAUGHT, "target.context": " "}, None, ["the context is empty"]),
    ("two contexts", {**TAUGHT, "target.context_file": "nowhere.txt"}, None, ["expected one of context"]),
    (
        "a context that is not there",
        {**TEACHER, "target.kind": "context", "target.context_file": "rewards.pi"},
        None,
        ["rewards.pi", "no such file", "rewards.py'?"],
    ),
    ("a context past the model's", {**TAUGHT, "target.context": "good " * 70}, None, ["context of 64"]),
    (
        "an option of distill",
        {**TAUGHT, "method": "reverse_kl", "top_k": 3},
        None,
        ["top_k is an option of method distill", "reverse_kl"],
    ),
    (
        "its gradient elsewhere",
        {**TAUGHT, "method": "reverse_kl", "sequence_gradient": True},
        None,
        ["sequence_gradient is an option of method distill"],
    ),
    (
        "a penalty of a lesson",
        {**TAUGHT, "kl_penalty": "k2_as_loss"},
        None,
        ["kl_penalty: distill does not read it"],
    ),
    (
        "options of rewards for a lesson",
        {**TAUGHT, "clip": 3, "eval_steps": 2},
        None,
        ["clip, eval_steps: distill does not read it"],
    ),
    ("a controller of a lesson", {**TAUGHT, "kl_target": 1}, None, ["kl_target: distill does not read it"]),
    ("a plan of a lesson", {**TAUGHT, "plan": "nowhere"}, None, ["plan: distill does not read it"]),
    (
        "what follows a teacher's tokens",
        {**TAUGHT, "sequence_gradient": True},
        None,
        ["got teacher_draws 1 and num_iterations 1, expected less than 1 and 1"],
    ),
    (
        "what follows old tokens",
        {**TAUGHT, "sequence_gradient": True, "teacher_draws": 0, "num_iterations": 2},
        None,
        ["got teacher_draws 0 and num_iterations 2"],
    ),
    (
        "virtual tokens past the context",
        {**TAUGHT, "family.kind": "prefix", "family.num_virtual_tokens": 60},
        None,
        ["context of 4 beside 60 virtual tokens"],
    ),
    ("a lesson from a tilt", {**TEACHER, "target.kind": "tilt"}, None, ["a target that is a policy"]),
    ("no such teacher", {**TEACHER, "target.teacher": "./nowhere"}, None, ["./nowhere"]),
    (
        "a teacher of other words",
        {**TEACHER},
        "teacher_of_other_words",
        [
            "target.teacher",
            "model: its tokenizer has other words than that of",
            "tiny-model",
            "same tokenizer",
        ],
    ),
    (
        "an adapter of a kind unknown",
        {**TEACHER},
        "teacher_unknown",
        ["adapter", "got peft_type IA3", "expected a LoRA adapter"],
    ),
    ("weights that do not fit", {"reward_weights": [1.0, 2.0]}, None, ["2 reward_weights", "1 reward_funcs"]),
]
REWARDS = """
def short(completions, **columns): return [1.0]
def words(completions, **columns): return ["good" for _ in completions]
def nan(completions, **columns): return [float("nan") for _ in completions]
def fails(completions, **columns): return [1 / 0 for _ in completions]
def same(completions, **columns): return [1.0 for _ in completions]
class Kind: pass
"""


KEYS = {
    "no_weights": "model_name_or_path",
    "no_end": "model_name_or_path",
    "refuses": "model_name_or_path",
    "other_words": "reference",
    "teacher_of_other_words": "target.teacher",
}
"""a change to a copy of the model -> the option that names the copy"""


def prepare(folder, settings, change):
    """Change the files of a run as a case asks."""
    with (folder / "rewards.py").open("a") as file:
        file.write(REWARDS)
    if change == "teacher_unknown":
        (folder / "model").mkdir()
        (folder / "model/adapter_config.json").write_text('{"peft_type": "IA3"}')
        settings["target.teacher"] = str(folder / "model")
    elif isinstance(change, str) and change in KEYS:
        model = folder / "model"
        shutil.copytree(settings["model_name_or_path"], model)
        settings[KEYS[change]] = str(model)
    if change == "no_weights":
        (model / "model.safetensors").unlink()
    elif change == "refuses":
        (model / "chat_template.jinja").write_text("{{ raise_exception('no reviews') }}")
    elif change == "folder":
        (folder / "none").mkdir()
    elif change == "no_end":
        for name, key in (
            ("config.json", "eos_token_id"),
            ("generation_config.json", "eos_token_id"),
            ("tokenizer_config.json", "eos_token"),
        ):
            values = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps({**values, key: None}))
    elif change in ("other_words", "teacher_of_other_words"):
        text = (model / "tokenizer.json").read_text()
        (model / "tokenizer.json").write_text(text.replace('"film"', '"movie"'))
    elif change == "long":
        rows = [{"prompt": "good " * 60, "split": s} for s in ("train", "test")]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif isinstance(change, list) or change == "":
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, change)))


def refused(result, words):
    status, out, err = result
    assert status == 2, (status, out, err)
    assert "Traceback" not in out + err
    for word in words:
        assert any(part in err for part in word.split("|")), (word, err)


@pytest.mark.parametrize(("changes", "files", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input(klimb, tiny_run, options, tmp_path, monkeypatch, changes, files, words):
    monkeypatch.chdir(tmp_path)
    settings = {**tiny_run, **changes}
    prepare(tmp_path, settings, files)
    before = sorted(tmp_path.rglob("*"))
    refused(klimb("climb", "-q", *options(settings)), words)
    after = [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)]
    assert after == before  # nothing half-written


def test_a_plan_needs_draws(klimb, tiny_run, options, tmp_path):
    settings = {**tiny_run, **DATA}
    prepare(tmp_path, settings, JUDGED["pairs"])
    refused(klimb("plan", *options(settings)), ["plan: learn_from data draws nothing"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "targets"], ["got 'targets'", "draws or target"]),
        (["--from", "target"], ["--beta None", "positive number"]),
        (["--from", "target", "--beta", "-1"], ["--beta -1"]),
        (["--beta", "0.1"], ["use --from target"]),
        (["--from", "target", "--beta", "0.1", "--bound", "0.1"], ["the bound 0.1 is not one"]),
        (["-o", "pairs.txt"], ["expected a file ending in .jsonl"]),
        (["-o", "rewards.py/pairs.jsonl"], ["no such folder rewards.py"]),
        (["-o", "there.jsonl"], ["there.jsonl: is there already", "--force"]),
    ],
)
def test_pairs_that_cannot_be_made(klimb, planned, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    refused(klimb("data", "pairs", planned, *words, *([] if "-o" in words else ["-o", "new.jsonl"])), said)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_pairs_of_the_target_need_draws_of_the_reference(klimb, tiny_run, options, planned, tmp_path):
    assert klimb("sample", planned, "-q", "--method", "best_of")[0] == 0
    words = ["-o", tmp_path / "new.jsonl", "--from", "target", "--beta", "0.1"]
    found = klimb("data", "pairs", planned / "draws/sample.parquet", *words)
    refused(found, ["keeps draws of the reference", "best of n"])


def test_targets_that_are_in_python_only_are_there():
    assert set(PYTHON_ONLY.values()) <= set(klimb.target.__all__)


def test_rejection_draws_from_the_tilt_alone(klimb, tiny_run, options):
    settings = {**tiny_run, "kl_budget": None, "beta": 0.5, "target.kind": "length_normalized"}
    found = klimb("sample", *options(settings), "--method", "rejection", "--bound", "1.5")
    refused(found, ["plain tilt", "length_normalized"])


def test_bad_yaml_is_named_by_line_and_keys_by_their_neighbours(klimb, tmp_path):
    file = tmp_path / "run.yaml"
    for text, words in [
        ("dataset_name: a\nreward_funcs: b: c\n", ["run.yaml, line 2", "not YAML"]),
        ("dataset_nam: a\n", ["dataset_nam", "did you mean 'dataset_name'"]),
        ("family: {kind: lora, rank: 4}\n", ["family.rank", "family.r"]),
        (
            "family: {kind: full, r: 4}\ndataset_name: a\nreward_funcs: b:c\n",
            ["family.r", "family.kind full"],
        ),
        ("- a\n", ["got list"]),
        ("x: !!python/name:os.system\n", ["not YAML"]),
        ("dataset_name: a\n", ["no reward_funcs: expected a reward"]),
        ("seed: 1\nbeta: 1\nseed: 2\n", ["run.yaml, line 3: seed stands there a second time", "line 1"]),
        ("family: {r: 4, r: 8}\n", ["r stands there a second time"]),
        ("max_steps: yes\ndataset_name: a\nreward_funcs: b:c\n", ["max_steps: got true, expected a number"]),
        ("family: {r: on}\ndataset_name: a\nreward_funcs: b:c\n", ["family.r: got true, expected a number"]),
        ("prompt_column: null\ndataset_name: a\nreward_funcs: b:c\n", ["prompt_column: got null"]),
        ("dataset_name: a\nreward_funcs: 7\n", ["reward_funcs: got 7, expected the name of a reward"]),
    ]:
        file.write_text(text)
        refused(klimb("climb", "-c", file), words)
    refused(
        klimb("climb", "-c", tmp_path / "rum.yaml"),
        ["no such file", f"did you mean '{tmp_path / 'run.yaml'}'"],
    )
    refused(klimb("climb", file), [f"expected -c {file}"])


def test_an_error_of_the_hub_is_one_line(klimb, tiny_run, options):
    found = klimb("climb", *options({**tiny_run, "reward_funcs": "nobody/nothing"}))
    refused(found, ["reward model nobody/nothing: cannot be loaded", "expected a folder or hub id"])
    assert found[2].count("\n") == 1


def test_a_mistake_in_a_file_of_rewards_is_said_to_be_there(klimb, tiny_run, options, tmp_path):
    (tmp_path / "broken.py").write_text("def good(:\n")
    found = klimb("climb", *options({**tiny_run, "reward_funcs": f"{tmp_path}/broken.py:good"}))
    refused(found, ["broken.py, line 1"])
    assert "load.py" not in found[2]


def test_what_is_no_folder_of_a_run_is_called_what_it_is(klimb, tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    for name, said in (("a.yaml", "got a file"), ("b", "no such folder"), ("", "got a folder without a run")):
        refused(klimb("report", tmp_path / name), [said, "name the output_dir of a run"])


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the page takes longer than all the rest, and is not what these tests look at."""
    monkeypatch.setattr("klimb.run.report", lambda path, watch=None: None)


@pytest.fixture
def planned(klimb, tiny_run, options, tmp_path):
    """A run that was planned, with a pool of sixteen prompts."""
    assert klimb("plan", "-q", *options(tiny_run))[0] == 0
    return tmp_path / "run"


def test_an_output_directory_that_holds_another_run(klimb, tiny_run, options, planned):
    before = {p: p.read_bytes() for p in planned.rglob("*") if p.is_file()}
    refused(klimb("climb", "-q", *options(tiny_run)), ["holds another run", "--resume"])
    assert {p: p.read_bytes() for p in planned.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_funcs": "rewards.py:other"}, ["of another reward"]),
        ({"dtype": "float64"}, ["of another model"]),
        ({"max_completion_length": 7}, ["of another max_completion_length"]),
        ({"plan": "nowhere.parquet"}, ["nowhere.parquet", "no such file"]),
        ({"plan": "prompts.jsonl"}, ["prompts.jsonl", "Parquet"]),
        ({"max_prompts": 4}, ["other prompts"]),
    ],
)
def test_a_pool_from_elsewhere_is_refused(
    klimb, tiny_run, options, planned, tmp_path, monkeypatch, changes, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text((tmp_path / "rewards.py").read_text() + "\nother = good\n")
    if "reward_funcs" not in changes:
        (tmp_path / "rewards.py").write_text(
            (tmp_path / "rewards.py").read_text().replace("\nother = good\n", "")
        )
    settings = {**tiny_run, "output_dir": str(tmp_path / "new"), "plan": str(planned), **changes}
    refused(klimb("train", "-q", *options(settings)), words)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_and_what_was_there_is_whole(klimb, tiny_run, options, planned, monkeypatch):
    import errno
    import os

    real, left = os.fsync, [40]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(klimb("train", "-q", "--resume", planned), ["disk is full"])
    assert not list(planned.rglob("*.tmp"))
    assert klimb("train", "-q", "--resume", planned)[0] == 0  # room was made


def test_a_corrupt_checkpoint_is_named_and_the_one_before_used(klimb, planned):
    assert klimb("train", "-q", "--resume", planned)[0] == 0
    weights = (planned / "policy/adapter_model.safetensors").read_bytes()
    metrics = (planned / "metrics.jsonl").read_text()
    *_, before, newest = list_checkpoints(planned / "checkpoints")
    file = newest / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    status, out, err = klimb("train", "--resume", planned)
    assert status == 0, err
    assert str(newest).split("/")[-1] in out.replace("\n", "")
    assert "corrupt" in out
    assert (planned / "policy/adapter_model.safetensors").read_bytes() == weights
    assert len((planned / "metrics.jsonl").read_text().splitlines()) == len(metrics.splitlines())
    assert before.is_dir()


def test_measure_and_sample_refuse_what_they_cannot_do(klimb, tiny_run, options, planned, tmp_path):
    refused(klimb("measure", planned), ["run/policy", "no such folder"])
    refused(klimb("measure", tmp_path / "nothing"), ["holds no run"])
    refused(klimb("measure"), ["the directory of a run, or -c FILE"])
    refused(klimb("plan", "--profile"), ["--profile", "steps of a training", "train or climb"])
    refused(klimb("sample", planned, "--method", "rejection"), ["bound"])
    refused(klimb("sample", planned, "--method", "gibbs"), ["gibbs", "best_of"])
    refused(klimb("sample", planned, "--method", "rejection", "--bound", "0.1"), ["the bound 0.1 is not one"])
    refused(klimb("train", "--resume", tmp_path / "nothing"), ["holds no run"])
    refused(klimb("train", "--resume", planned, "--max_steps", "9"), ["leave the other options out"])


def test_diagnose_refuses_what_is_no_run(klimb, planned, tmp_path):
    refused(klimb("diagnose"), ["Usage: klimb diagnose"])
    refused(klimb("diagnose", tmp_path / "nothing"), ["nothing", "holds no run", "output_dir"])
    refused(klimb("diagnose", planned, "--audti", "x"), ["--audti", "--audit"])
    before = {p: p.read_bytes() for p in planned.rglob("*") if p.is_file()}
    assert klimb("diagnose", planned)[0] == 0
    assert {p: p.read_bytes() for p in planned.rglob("*") if p.is_file()} == before
    (planned / "config.yaml").write_text("- a\n")
    refused(klimb("diagnose", planned), ["config.yaml", "got a list"])
    (planned / "config.yaml").write_text("seed: [\n")
    refused(klimb("diagnose", planned), ["config.yaml", "not YAML"])


def test_weights_that_are_broken_are_named(klimb, planned):
    assert klimb("train", "-q", "--resume", planned)[0] == 0
    (planned / "policy/adapter_model.safetensors").write_bytes(b"no")
    for verb in ("measure", "sample"):
        refused(klimb(verb, planned), ["run/policy: its weights cannot be read", "train once more"])


def test_measuring_another_policy_leaves_the_run_as_it_is(klimb, planned, tiny_model):
    assert klimb("climb", "-q", "--resume", planned)[0] == 0
    before = {p: p.read_bytes() for p in planned.rglob("*") if p.is_file()}
    status, out, _ = klimb("measure", planned, "--policy", tiny_model, "--json")
    assert status == 0
    assert abs(json.loads(out)["kl"]["value"]) < 1e-6
    assert {p: p.read_bytes() for p in planned.rglob("*") if p.is_file()} == before
    assert klimb("measure", planned, "--policy", planned / "policy", "--measure_draws", "16", "-q")[0] == 0
    assert {p: p.read_bytes() for p in planned.rglob("*") if p.is_file()} != before


def test_a_place_without_rights_is_one_line(klimb, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/there/page.html")

    monkeypatch.setattr("klimb.explorer.write_explorer", refuse)
    refused(klimb("explore", "-o", tmp_path / "page.html"), ["/there/page.html: Permission denied"])
    monkeypatch.setenv("KLIMB_DEBUG", "1")
    with pytest.raises(PermissionError):
        klimb("explore", "-o", tmp_path / "page.html")


def test_hyphens_and_underscores_are_the_same(klimb, planned):
    for option in ("--num-draws", "--num_draws"):
        status, out, err = klimb("sample", planned, option, "2", "--limit", "1", "--json")
        assert status == 0, err
        assert json.loads(out)["draws"] == 2


def test_a_commands_own_option_is_the_nearest_too(klimb, planned):
    refused(
        klimb("sample", planned, "--num-drawz", "2"), ["no option --num_drawz", "did you mean '--num_draws'?"]
    )
    refused(klimb("measure", planned, "--quite", "1"), ["no option --quite", "did you mean '--quiet'?"])


def test_more_prompts_than_there_are(klimb, planned):
    assert klimb("climb", "-q", "--resume", planned)[0] == 0
    status, out, _ = klimb("measure", planned, "--measure_prompts", "99")
    assert status == 0
    assert "measure_prompts 99: there are 8, and all of them are measured on" in " ".join(out.split())
    assert "all of them are" not in klimb("measure", planned, "--measure_prompts", "8")[1]


def test_debug_shows_the_traceback(klimb, monkeypatch):
    from klimb.cli import main

    monkeypatch.setenv("KLIMB_DEBUG", "1")
    with pytest.raises(ValueError, match="holds no run"):
        main(["train", "--resume", "nowhere"])
