"""NPE of the package sbi on stored simulations; run by the Python of an environment that has it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn


def main(folder: str, seed: int, draws: int) -> None:
    torch.manual_seed(seed)
    data = np.load(f"{folder}/in.npz")
    theta, y = torch.tensor(data["theta"]), torch.tensor(data["y"])
    low, high = (-1.0, 1.0) if theta.shape[1] == 2 else (-3.0, 3.0)
    box = torch.ones(theta.shape[1])
    prior = torch.distributions.Independent(torch.distributions.Uniform(low * box, high * box), 1)
    density = posterior_nn("nsf", hidden_features=64, num_transforms=5, num_bins=8)
    inference = NPE(prior=prior, density_estimator=density, show_progress_bars=False)
    start = time.process_time()
    estimator = inference.append_simulations(theta, y).train(training_batch_size=256)
    seconds = time.process_time() - start
    posterior = inference.build_posterior(estimator)
    found = [
        posterior.sample((draws,), x=x, show_progress_bars=False).numpy()
        for x in torch.tensor(data["observations"])
    ]
    np.save(f"{folder}/peer.npy", np.stack(found))
    epochs = inference.summary["epochs_trained"][-1]
    result = {
        "seconds": seconds,
        "loss": min(inference.summary["validation_loss"]),
        "steps": epochs * (0.9 * len(theta) // 256),
    }
    Path(f"{folder}/peer.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
