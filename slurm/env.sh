# Site settings for all batch scripts of this folder. Edit once. This file only sets variables.
#
#     source slurm/env.sh && sbatch slurm/train_xl.sh          (docs/slurm.md)
#
# The submitting shell sources it for the SBATCH_* variables; sbatch's command line overrides them, and they override the
# #SBATCH lines of the scripts. A job sources this file again on its first node.
# MEGASTAR_ENV=FILE selects another file.

# --- partition, account and limits (sbatch) ---
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_TIMELIMIT=8:00:00      # the site's maximum; a run that reaches it is requeued and resumes

# --- where megastar is installed: a virtual environment or a container; leave both empty if it is on PATH ---
MEGASTAR_VENV=${MEGASTAR_VENV-.venv}
MEGASTAR_MODULES=""                    # modules to load, for example "cuda/12.8 gcc/13"
MEGASTAR_SRUN=()                       # additional options of srun; a container by pyxis:
# MEGASTAR_SRUN=(--container-image=/images/megastar.sqsh "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
MEGASTAR_PREFIX=()                     # prefix of the command; a container by Apptainer:
# MEGASTAR_PREFIX=(apptainer exec --nv --bind "$PWD" /images/megastar.sif)

MEGASTAR_ASK_TIMEOUT=${MEGASTAR_ASK_TIMEOUT:-600}  # seconds for megastar to print the run folder before a job starts

# --- network ---
# export RES_OPTIONS="timeout:1 attempts:3"                  # timeout of name lookups; this is the default
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0      # the interface of the rendezvous
# export NCCL_IB_HCA=mlx5
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --- data ---
MEGASTAR_SCRATCH=${MEGASTAR_SCRATCH-}  # a local disk of each node, used to cache shards read from s3:// (data.cache)
# export AWS_ENDPOINT_URL=https://s3.example.org AWS_PROFILE=project

# --- node losses (docs/elastic.md); submit with sbatch --no-kill ---
# export MEGASTAR_ELASTIC=3:4          # train on 3 to 4 of the job's nodes; the others are spare

# --- limits of requeues ---
MEGASTAR_MAX_REQUEUES=${MEGASTAR_MAX_REQUEUES:-50}  # total
MEGASTAR_MAX_CRASHES=${MEGASTAR_MAX_CRASHES:-3}     # consecutive, without a new checkpoint
MEGASTAR_MAX_SIGNALS=${MEGASTAR_MAX_SIGNALS:-10}    # consecutive ends by a signal, without a new checkpoint

# --- excluded hosts (RUN/bad_hosts.log) ---
MEGASTAR_BAD_HOST_CRASHES=${MEGASTAR_BAD_HOST_CRASHES:-2}  # crashes after which a host is excluded; 0: never
MEGASTAR_MAX_EXCLUDED=${MEGASTAR_MAX_EXCLUDED:-4}          # maximum number of hosts; beyond it the oldest are used again
