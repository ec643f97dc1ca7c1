"""A SearchConfig -> networks tried until there are enough -> found.json and the report."""

import logging
from pathlib import Path

from training.searching.artifact_latency import ArtifactBench
from training.searching.experiment import prepare
from training.searching.search_config import SearchConfig
from training.searching.storage import open_storage
from training.searching.study import open_study, setting_of
from training.searching.worker import Worker

log = logging.getLogger(__name__)


def main(config: SearchConfig) -> Path:
    """Search; return the report.

    Raises:
        SearchError: the study was made for something else; many networks in a row failed.
        StorageError: the database cannot be used.
        ValueError, FileNotFoundError, DatasetError: the space or the data cannot be used.
        KeyboardInterrupt: Ctrl-C; the network under way counts as not trained.
    """
    space = config.space()
    experiment = prepare(config)
    storage = open_storage(
        config.storage, config.directory, 60 * config.wait_minutes, config.heartbeat
    )
    setting = setting_of(config, experiment, space)
    study = open_study(config, storage, setting)
    bench = None
    if config.target_artifact is not None:
        folder = config.directory / "artifacts"
        bench = ArtifactBench(config, experiment, space.backbone, folder)
    worker = Worker(config, experiment, space, study, storage, bench)
    log.info("%s choices", f"{space.num_choices:,}")
    worker.run()
    return config.directory
