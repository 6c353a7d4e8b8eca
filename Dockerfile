# The command in an image, to run on borrowed machines. Not built by the tests; they hold it against the repository.
#   CPU:   docker build -t finetune .
#   CUDA:  docker build -t finetune --build-arg TORCH=cu130 .     (torch's wheels bring CUDA; the host needs the driver)
# In it:   docker run --gpus all --shm-size 8g -v "$PWD:/work" -e HF_TOKEN finetune train recipe.yaml
FROM python:3.11-slim

# Which build of torch, by the name of its index: cpu, cu126, cu128, cu130.
ARG TORCH=cpu
# Extras of the package, and what train.copy_to needs for its places: s3fs, gcsfs, adlfs.
ARG EXTRAS=tensorboard
ARG PLACES=s3fs

WORKDIR /opt/finetune
COPY pyproject.toml requirements.lock README.md CHANGELOG.md LICENSE ./
COPY finetune finetune
COPY recipes recipes
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" \
        "$(grep '^torch==' requirements.lock)" \
    && pip install --no-cache-dir ".[${EXTRAS}]" ${PLACES} -c requirements.lock

# No root, and a home whose cache can be mounted.
RUN useradd --create-home trainer && mkdir /work && chown trainer /work
USER trainer
WORKDIR /work

# `docker stop` sends SIGTERM, which saves and ends with code 6: give it time (docker stop -t 300).
STOPSIGNAL SIGTERM
ENTRYPOINT ["finetune"]
CMD ["--help"]
