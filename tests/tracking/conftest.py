import numpy as np
import pytest
from PIL import Image

from loupe.data.images import Geometry
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.tracking import logged_models, registry
from loupe.tracking.runs import connect, start_run


class Store:
    """A real SQLite store with one logged model, which any number of versions may come from."""

    def __init__(self, folder):
        self.folder, self.client = folder, connect("pets")
        config = ClassifierConfig("lenet5", ["cat", "dog"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
        geometry = Geometry(32, 32, 3, 32, 32, 32, 32, "squash", "bilinear")
        save_classifier(build_classifier(config, "none"), {"geometry": geometry.to_json()}, folder / "model")
        examples = [folder / f"{number}.png" for number in range(2)]
        for path in examples:
            Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(path)
        with start_run("classifier", {}, {}) as run_id:
            self.model_uri = logged_models.log_model(folder / "model", examples)
        self.experiment_id = self.client.get_run(run_id).info.experiment_id

    def register(self, name):
        """The number of a new version of a run of its own."""
        run_id = self.client.create_run(self.experiment_id).info.run_id
        return str(registry.register_version(self.client, name, run_id, self.model_uri).version)

    def aliases(self, name):
        """Version by alias, without the challenger's."""
        known = self.client.get_registered_model(name).aliases
        return {alias: str(version) for alias, version in known.items() if alias != "challenger"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield Store(folder)
