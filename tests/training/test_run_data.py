from effdet_fast.training.config import TrainConfig
from effdet_fast.training.distributed import Processes
from effdet_fast.training.run_data import open_data


def test_pictures_are_normalized_as_the_model_options_say(data):
    """Those of validation too, which the trainer does not normalize itself."""
    paths = {name: str(path) for name, path in data.items()}
    options = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = TrainConfig(**paths, model="efficientdet_lite0", model_options=options, batch_size=2, workers=0)
    opened = open_data(config, Processes())
    for loader in (opened.train_loader, opened.val_loader):
        assert (loader.mean, loader.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
