# GPU image of the project:
#   docker build --build-arg GIT_COMMIT=$(git rev-parse HEAD) -t onlinenorm . && docker run --gpus all onlinenorm
# Training with loader workers: docker run --ipc=host (or --shm-size=8g), for batches travel through /dev/shm, 64 MB by default.
# It runs as the user ubuntu (1000): docker run -v $PWD/runs:/onlinenorm/runs keeps runs where that user may write.
# The CUDA libraries come with torch's wheels; the base image adds the container settings that expose the driver.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# gcc and Python's headers: Triton builds its launchers, torch.compile its wrappers.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /onlinenorm
RUN chown ubuntu .
USER ubuntu

# What an installation reads, and an empty package in place of ours: no other change installs everything anew.
COPY --chown=ubuntu pyproject.toml constraints.txt LICENSE ./
COPY --chown=ubuntu scripts/environment.sh scripts/
RUN mkdir onlinenorm && touch onlinenorm/__init__.py && scripts/environment.sh
COPY --chown=ubuntu . .

# Runs record it in environment.json.
ARG GIT_COMMIT=unknown
ENV GIT_COMMIT=$GIT_COMMIT

CMD ["scripts/quickstart.sh"]
