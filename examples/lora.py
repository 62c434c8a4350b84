"""LoRA fine-tuning of a small transformer with SAM, on sentences that it makes itself.

    pip install peft transformers
    python examples/lora.py

The network is made here, so nothing is fetched: it is first trained to tell the first number of a
sentence, then fine-tuned through adapters to tell in which range of four numbers it lies.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from fastsam import SAM

logging.set_verbosity_error()


def sentences(n, width):
    ids = torch.randint(32, (n, 8))
    return ids, ids[:, 0] // width


def train(model, opt, ids, labels, epochs):
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    for epoch in range(epochs):
        losses = []
        for x, y in zip(ids.split(64), labels.split(64), strict=True):
            loss = cross_entropy(model(input_ids=x).logits, y)
            loss.backward()
            if isinstance(opt, SAM):
                opt.first_step(zero_grad=True)
                cross_entropy(model(input_ids=x).logits, y).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        if epoch % 5 == 4 or epoch == 0:
            print(f"  epoch {epoch + 1:2}  loss {sum(losses) / len(losses):.3f}", flush=True)


@torch.no_grad()
def accuracy(model, ids, labels):
    model.eval()
    return 100 * (model(input_ids=ids).logits.argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rho", type=float, default=0.02)
    parser.add_argument("--quick", action="store_true", help="fewer sentences and epochs")
    args = parser.parse_args()
    n, epochs = (512, 10) if args.quick else (1024, args.epochs)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        num_labels=32, vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    print("pretraining")
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), *sentences(n, 1), epochs)
    model = get_peft_model(model, LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value", "dense"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    print(f"fine-tuning {sum(p.numel() for p in trained)} of {total} parameters with SAM")
    opt = SAM(trained, torch.optim.AdamW, rho=args.rho, lr=1e-2)
    train(model, opt, *sentences(n, 4), epochs)
    print(f"accuracy on new sentences {accuracy(model, *sentences(1000, 4)):.1f} %")


if __name__ == "__main__":
    main()
