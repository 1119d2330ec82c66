"""What would make training fail later, or teach nothing: said in one line before it starts."""

from pathlib import Path

from cappy.errors import ConfigError, FolderError
from cappy.training.corpus import Corpus
from cappy.training.distributed import Ranks
from cappy.training.feed import updates_of
from cappy.training.settings import TrainingSettings

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "tokenizer_config.json")


def refuse_unfit(train: Corpus, plan: TrainingSettings, ranks: Ranks) -> None:
    """ConfigError where these instances cannot be learned from as the plan says."""
    if not len(train):
        raise ConfigError("training: no training instance has two different responses; sample more candidates")
    facts = train.facts
    if facts.lowest == facts.highest:
        remedy = "nothing can be learned; choose another --metric or sample more candidates"
        raise ConfigError(f"training: every label {plan.metric!r} is {facts.lowest:g}; {remedy}")
    if plan.schedule == "published" and updates_of(train, plan) < 2:
        raise ConfigError("--schedule published: begins at rate 0, and this is one update; give more --train-rows")
    if len(train) < ranks.count:
        raise ConfigError(f"training: {len(train)} instances for {ranks.count} ranks; give fewer --devices or --nodes")
    if plan.batch_instances < ranks.count:
        remedy = f"give --batch-instances {ranks.count} or more, or fewer --devices"
        raise ConfigError(f"--batch-instances {plan.batch_instances}: is less than the {ranks.count} ranks; {remedy}")
    if plan.batch_tokens < train.longest_pair:
        remedy = f"give --batch-tokens {train.longest_pair} or more"
        raise ConfigError(f"--batch-tokens {plan.batch_tokens}: a pair may have {train.longest_pair} tokens; {remedy}")


def refuse_without_tokenizer(folder: Path) -> None:
    """FolderError where an encoder's folder has no tokenizer: transformers would make an empty one."""
    if not any(path for pattern in TOKENIZER_FILES[:-1] for path in folder.glob(pattern)):
        remedy = "save the tokenizer beside the weights (tokenizer.save_pretrained)"
        raise FolderError(f"{folder}: holds no tokenizer ({TOKENIZER_FILES[0]} or a vocabulary); {remedy}")
