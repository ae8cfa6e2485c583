"""CTC fine-tuning with LoRA and transformers' Trainer, on batches in which padding changes nothing.

    python examples/ctc_finetune.py corpus/train.jsonl model/ --model microsoft/wavlm-base-plus --epochs 10

A line of the manifest is {"audio_filepath": "a.wav", "text": "what is said"}, paths relative to it. The vocabulary is
the characters of its texts. model/ becomes a checkpoint like any other, the adapters merged, with its processor:
`wavlm-fast extract corpus/ --model model/ --what text --out said/`. Needs peft and accelerate.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from wavlm_fast import WavLMForCTC, audio


def processor_for(rows: list[dict[str, Any]], model: str, out: Path) -> Wav2Vec2Processor:
    """Waveforms prepared as the checkpoint wants them, and texts as ids of their characters."""
    letters = {letter for row in rows for letter in row["text"]} - {" "}
    tokens = ["<pad>", "<unk>", "|", *sorted(letters)]  # <pad> is CTC's blank, | the space
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    tokenizer = Wav2Vec2CTCTokenizer(out / "vocab.json", bos_token=None, eos_token=None)
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor.from_pretrained(model), tokenizer)


class Collator:
    """Rows of the manifest to a padded batch with its mask, which the checkpoints of base would not ask for."""

    def __init__(self, processor: Wav2Vec2Processor, root: Path) -> None:
        self.processor, self.root = processor, root

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        waveforms = [audio.load(self.root / row["audio_filepath"])[0].numpy() for row in rows]
        batch = self.processor.feature_extractor(
            waveforms, sampling_rate=audio.RATE, padding=True, return_attention_mask=True, return_tensors="pt"
        )
        texts = self.processor.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": texts.input_ids.masked_fill(texts.attention_mask == 0, -100)}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path, help="the folder for the new checkpoint")
    parser.add_argument("--model", default="microsoft/wavlm-base-plus")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    args = parser.parse_args(words)

    rows = [json.loads(line) for line in args.manifest.read_text().splitlines() if line.strip()]
    processor = processor_for(rows, args.model, args.out)
    options = {"vocab_size": len(processor.tokenizer), "pad_token_id": 0, "ctc_zero_infinity": True}
    model = WavLMForCTC.from_pretrained(args.model, padding="exact", ignore_mismatched_sizes=True, **options)
    model.freeze_feature_encoder()
    lora = LoraConfig(r=args.rank, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, lora)
    steps = TrainingArguments(
        str(args.out / "steps"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        learning_rate=args.rate,
        remove_unused_columns=False,  # the collator wants them all
        save_strategy="no",
    )
    Trainer(model, steps, Collator(processor, args.manifest.parent), rows).train()
    model.merge_and_unload().save_pretrained(args.out)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
