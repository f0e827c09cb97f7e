"""Draws what focal loss does: its curves, and where the loss of a trained detector comes from on real photographs.

The first picture is Figure 1 of the paper (Lin et al., arXiv:1708.02002): the loss of one example against the probability p_t
that the model gives the right answer. The second weighs the classification loss of every anchor and class of a checkpoint on the
validation photograph of `neon_data.py`: how much of the total comes from positives, from hard negatives and from easy ones,
p_t above 0.9, for cross entropy (gamma 0) and for focal loss.

    python examples/focal_loss.py --checkpoint runs/neon_trees/best.pt [--data examples/data] [--output docs]
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from neon_data import make_data_set

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import effdet_fast
from effdet_fast import ops
from effdet_fast.data import CocoDetection, create_loader, normalize

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
EASY = 0.9  # p_t from which on a negative counts as easy
PARTS = ("positives", "hard negatives", "easy negatives")


def loss_curves(probabilities: torch.Tensor) -> dict[float, torch.Tensor]:
    """Loss of a positive that gets each of the probabilities, by gamma; alpha, which scales all alike, is left out."""
    logits = torch.logit(probabilities)
    target = torch.ones_like(logits)
    return {gamma: ops.sigmoid_focal_loss(logits, target, alpha=-1, gamma=gamma) for gamma in GAMMAS}


def loss_by_part(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each of `PARTS` occurs and how much of the loss is theirs.

    Args:
        logits: [N, classes].
        labels: int64 [N], a class or -1 for background.

    Returns:
        Counts [3] and sums of the loss [3], both float64.
    """
    loss = ops.sigmoid_focal_loss(logits.double(), labels, alpha=-1, gamma=gamma)
    positive = torch.nn.functional.one_hot(labels + 1, logits.shape[1] + 1)[:, 1:].bool()
    easy = ~positive & (torch.sigmoid(-logits.double()) > EASY)
    masks = (positive, ~positive & ~easy, easy)
    return torch.stack([mask.sum() for mask in masks]).double(), torch.stack([loss[mask].sum() for mask in masks])


@torch.no_grad()
def validation_loss_by_part(checkpoint: Path, images: Path, annotations: Path) -> dict[float, list[torch.Tensor]]:
    """`loss_by_part` summed over all validation tiles, by gamma."""
    detector = effdet_fast.Detector.from_checkpoint(checkpoint)
    model, device = detector.model, detector.device
    config = model.config
    loader = create_loader(
        CocoDetection(images, annotations),
        image_size=detector.image_size,
        batch_size=4,
        training=False,
        mean=detector.mean,
        std=detector.std,
        workers=0,
    )
    sums = {gamma: [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)] for gamma in GAMMAS}
    for batch in loader:
        batch = batch.to(device)
        outputs, _ = model(normalize(batch.images, detector.mean, detector.std))
        targets = model.assign(batch.gt_boxes, batch.gt_labels)
        flat = [level.permute(0, 2, 3, 1).reshape(len(level), -1, config.num_classes) for level in outputs]
        logits = torch.cat(flat, dim=1).flatten(0, 1)
        for gamma, totals in sums.items():
            for total, part in zip(totals, loss_by_part(logits, targets.labels.flatten(), gamma), strict=True):
                total += part.cpu()
    return sums


def draw_curves(file: Path) -> None:
    probabilities = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(6, 4))
    for gamma, loss in loss_curves(probabilities).items():
        name = "cross entropy (gamma 0)" if gamma == 0 else f"gamma {gamma:g}"
        axis.plot(probabilities, loss, label=name)
    axis.set(xlabel="probability of the right answer, p_t", ylabel="loss", xlim=(0, 1), ylim=(0, 5))
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def draw_shares(sums: dict[float, list[torch.Tensor]], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    names = [f"gamma {gamma:g}" for gamma in sums]
    left = torch.zeros(len(sums), dtype=torch.float64)
    shares = torch.stack([loss / loss.sum() for _, loss in sums.values()])
    for part, color, share in zip(PARTS, ("tab:green", "tab:orange", "tab:gray"), shares.T, strict=True):
        axis.barh(names, share, left=left, label=part, color=color)
        left += share
    axis.set(xlabel="share of the classification loss", xlim=(0, 1))
    axis.invert_yaxis()
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what focal loss does.")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/neon_trees/best.pt"), help="a trained detector")
    parser.add_argument("--data", type=Path, default=Path("examples/data"), help="where downloads and tiles are kept")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the two pictures")
    arguments = parser.parse_args()
    sums = validation_loss_by_part(arguments.checkpoint, *make_data_set(arguments.data)["val"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw_curves(arguments.output / "focal_loss_curves.png")
    draw_shares(sums, arguments.output / "focal_loss_shares.png")
    print(f"{'':>10}{''.join(f'{part:>16}' for part in PARTS)}")
    counts = next(iter(sums.values()))[0]
    print(f"{'examples':>10}{''.join(f'{int(count):>16,}' for count in counts)}")
    for gamma, (_, loss) in sums.items():
        print(f"{f'gamma {gamma:g}':>10}{''.join(f'{share:>16.1%}' for share in loss / loss.sum())}")


if __name__ == "__main__":
    main()
