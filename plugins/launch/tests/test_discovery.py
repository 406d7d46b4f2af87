"""A process's place in a job, from the variables that schedulers and MPI's launchers set."""

from __future__ import annotations

import pytest
from drivetrain_launch.discovery import Place, discover, first_slurm_host

from drivetrain.errors import DrivetrainError

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPENMPI.items()}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (OPENMPI, Place("OpenMPI", 5, 8, 1, 4)),
        (MVAPICH, Place("MVAPICH", 5, 8, 1, 4)),
        (
            {**OPENMPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6105"},
            Place("Azure ML", 5, 8, 1, 4, "10.0.0.4", 6105),
        ),
        (
            {**OPENMPI, "AZ_BATCHAI_MPI_MASTER_NODE": "10.0.0.4"},
            Place("Azure ML", 5, 8, 1, 4, "10.0.0.4", 54965),
        ),
        (
            {
                "AZUREML_RUN_ID": "calm_sun_1",
                "NODE_RANK": "1",
                "RANK": "1",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "10.0.0.4",
                "MASTER_PORT": "6105",
            },
            Place("Azure ML", 1, 2, 0, 1, "10.0.0.4", 6105),
        ),
        (
            {
                "PMI_RANK": "3",
                "PMI_SIZE": "4",
                "MPI_LOCALRANKID": "1",
                "MPI_LOCALNRANKS": "2",
                "MASTER_ADDR": "node-a",
                "MASTER_PORT": "1234",
            },
            Place("MPI", 3, 4, 1, 2, "node-a", 1234),
        ),
        (
            {
                "SLURM_PROCID": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "4",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_STEP_NODELIST": "gpu7",
            },
            Place("Slurm", 2, 4, 0, 1, "gpu7"),
        ),
        (
            {
                "SM_HOSTS": '["algo-2", "algo-1"]',
                "SM_CURRENT_HOST": "algo-2",
            },
            Place("SageMaker", 1, 2, 0, 1, "algo-1"),
        ),
        (
            {
                "PET_NODE_RANK": "1",
                "PET_NNODES": "2",
                "PET_MASTER_ADDR": "job-node-0-0.job",
                "PET_MASTER_PORT": "29400",
            },
            Place("Kubeflow Trainer", 1, 2, 0, 1, "job-node-0-0.job", 29400),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script: no step yet
        ({}, None),
    ],
)
def test_the_place_is_what_the_variables_say(variables: dict, expected: Place | None) -> None:
    assert discover(variables) == expected


def test_variables_that_make_no_sense_are_named() -> None:
    broken = {**OPENMPI, "OMPI_COMM_WORLD_SIZE": "eight"}
    with pytest.raises(DrivetrainError, match=r"variables of openmpi make no sense.*'eight'"):
        discover(broken)
    del broken["OMPI_COMM_WORLD_SIZE"]
    with pytest.raises(DrivetrainError, match="OMPI_COMM_WORLD_SIZE is not set"):
        discover(broken)


def test_the_first_host_of_slurm_s_list_is_the_master() -> None:
    def names(text: str) -> list[str]:
        assert text == "gpu[3-5,9]"
        return ["gpu3", "gpu4", "gpu5", "gpu9"]

    assert first_slurm_host("gpu[3-5,9]", names) == "gpu3"
    assert first_slurm_host("gpu3") == "gpu3"
    assert first_slurm_host("") == ""


def test_several_processes_on_a_node_of_azure_are_refused() -> None:
    variables = {"AZUREML_RUN_ID": "a", "NODE_RANK": "1", "RANK": "9", "LOCAL_RANK": "1"}
    with pytest.raises(DrivetrainError, match="set process_count_per_instance to 1"):
        discover({**variables, "WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.4"})
