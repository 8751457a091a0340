"""Endpoints of an image: what is refused, what a revision keeps, and where a registry's password is."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from pilotlight.clusters.container_engine import ContainerEngine, PullError
from pilotlight.domain.endpoint import Container
from pilotlight.engines.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from pilotlight.management import RegistryLogins
from pilotlight.management.images import PULLS_MAX
from pilotlight.sealing import InstallationSecret

pytestmark = pytest.mark.timeout(600)
"""Images are made by whoever comes first."""

IMAGE = "ghcr.io/me/worker:1"
FOLDER = {"source": "named", "target": "/data"}


async def post(management, **body):
    return await management.http.post("/pilotlight/v1/endpoints", json={"kind": "queue"} | body)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"image": "Has/Capitals"}, "'Has/Capitals' is no image"),
        ({"image": "a b"}, "is no image"),
        ({"image": "https://registry/x"}, "is no image"),
        ({"image": "x@sha256:12"}, "is no image"),
        ({"command": ["x"], "volumes": [FOLDER]}, "volumes belongs to an image"),
        ({"command": ["x"], "shm_bytes": 1 << 20}, "shm_bytes belongs to an image"),
        ({"image": IMAGE, "registry_user": "me"}, "belong together"),
        ({"image": IMAGE, "registry_password": "x"}, "belong together"),
        (
            {"image": IMAGE, "volumes": [{"source": "rel/ative", "target": "/x"}]},
            "neither an absolute folder",
        ),
        ({"image": IMAGE, "volumes": [{"source": "/", "target": "x"}]}, "no absolute folder of a container"),
        ({"image": IMAGE, "volumes": [{"source": "/", "target": "/a/../b"}]}, "no absolute folder"),
        ({"image": IMAGE, "volumes": [{"source": "/", "target": "/"}]}, "below its root"),
        ({"image": IMAGE, "model": "m"}, "model belongs to the kind vllm"),
        ({"image": IMAGE, "kind": "vllm", "command": ["x"]}, "command belongs to the kinds"),
        ({"image": IMAGE, "kind": "vllm", "engine_url": "http://h:1"}, "exclude each other"),
    ],
)
async def test_what_cannot_be_meant_is_refused(management, body, sentence):
    answer = await post(management, **body)
    assert answer.status_code == 422, answer.text
    assert any(sentence in error for error in answer.json()["errors"]), answer.json()


@pytest.mark.parametrize(
    "image",
    [
        "busybox",
        "a/b",
        "ghcr.io/a/b-c.d_e:1.2-x",
        "localhost:5000/x",
        f"Host.example:5000/a/b@sha256:{'0' * 64}",
    ],
)
async def test_all_forms_of_references_are_understood(management, image):
    """They are; only no engine is there to be asked."""
    answer = await post(management, image=image)
    assert answer.status_code == 503
    assert "container engine" in answer.text


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"volumes": [{"source": "/no/such/folder", "target": "/x"}]}, "/no/such/folder does not exist"),
        ({"volumes": [{"source": "/etc", "target": "/x"}]}, "folder /etc may not be given to containers"),
        ({"volumes": [FOLDER, FOLDER]}, "two volumes have the target /data"),
        ({"gpu_count": 9}, "this host has"),
        ({"memory_bytes": 1 << 49}, "can give a worker at most"),
        ({"kind": "load-balancer", "env": {"PORT": "80"}}, "each gets a free port"),
    ],
)
async def test_what_cannot_run_here_is_refused_before_anything_is_fetched(management, body, sentence):
    answer = await post(management, image=IMAGE, **body)
    assert answer.status_code in {400, 422}, answer.text
    assert sentence in answer.text


async def test_a_gateway_that_follows_refuses(management):
    """Its machine is not where workers run; GPUs, folders and images there are others."""
    management.service.images._leads = lambda: False
    answer = await post(management, image=IMAGE)
    assert answer.status_code == 503
    assert "another gateway leads" in answer.text


async def test_a_password_that_is_wrong_in_form_is_not_repeated(management):
    answer = await post(management, image=IMAGE, registry_user="me", registry_password="p" * 20_000)
    assert answer.status_code == 422
    assert "pppp" not in answer.text


class TestRevisions:
    @pytest.fixture
    def image(self, podman, management):
        management.container_engine._url = podman.url
        return podman.build("quiet", f'FROM {podman.base()}\nCMD ["true"]\n', {"unused": ""})

    async def change(self, management, endpoint, **body):
        answer = await management.http.patch(f"/pilotlight/v1/endpoints/{endpoint['id']}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stored(self, management, endpoint):
        return management.directory.endpoint(endpoint["id"]).revision

    async def test_what_is_not_sent_stays(self, management, image, tmp_path):
        volume = {"source": str(tmp_path), "target": "/runpod-volume", "read_only": False}
        made = (
            await post(
                management, image=image, volumes=[volume], shm_bytes=1 << 30, memory_bytes=1 << 30,
                registry_user="me", registry_password="pass-word", env={"A": "1"},
            )
        ).json()  # fmt: skip
        assert (made["image"], made["volumes"], made["version"]) == (image, [volume], 1)
        assert made["name"] == "pilotlight-quiet"
        sealed = self.stored(management, made).container.registry_password
        assert sealed
        assert "pass-word" not in sealed
        logins = management.service.images.logins
        assert logins.of(made["id"], self.stored(management, made).container).password == "pass-word"
        changed = await self.change(management, made, command=["python", "x.py"])
        assert (changed["version"], changed["volumes"], changed["shm_bytes"]) == (2, [volume], 1 << 30)
        assert (changed["registry_user"], changed["env"]) == ("me", {"A": "1"})
        assert self.stored(management, made).container.registry_password == sealed
        open_again = await self.change(management, made, registry_user=None, registry_password=None)
        assert (open_again["version"], open_again["registry_user"]) == (3, "")
        assert self.stored(management, made).container.registry_password == ""
        # The same image once more: its content may be another.
        assert (await self.change(management, made, image=image))["version"] == 4
        assert (await self.change(management, made, env={"A": "1"}))["version"] == 4

    async def test_processes_become_containers(self, management, image):
        made = (await post(management, command=["sh", "-c", "exit"])).json()
        assert made["image"] is None
        changed = await self.change(management, made, image=image)
        # The program was this machine's; the image has its own.
        assert (changed["image"], changed["command"], changed["version"]) == (image, [], 2)

    async def test_a_password_is_not_told_to_another_registry(self, management, podman, image):
        """Whoever may change the image could otherwise have it sent to a server of his own."""
        login = {"registry_user": "me", "registry_password": "pass-word"}
        made = (await post(management, image=image, **login)).json()
        sealed = self.stored(management, made).container
        path = f"/pilotlight/v1/endpoints/{made['id']}"
        answer = await management.http.patch(path, json={"image": "127.0.0.1:9/me/worker:1"})
        assert answer.status_code == 422
        assert "is for localhost" in answer.text
        assert "127.0.0.1:9/me/worker:1 comes from 127.0.0.1:9" in answer.text
        elsewhere = f"registry.example/{image.rpartition('/')[2]}"
        podman.run("tag", image, elsewhere)
        changed = await self.change(management, made, image=elsewhere, **login)
        podman.run("untag", image, elsewhere)
        assert changed["registry_user"] == "me"
        # Also a stored one opens nothing for another registry.
        logins = management.service.images.logins
        with pytest.raises(PullError):
            logins.of(made["id"], replace(sealed, image="127.0.0.1:9/me/worker:1"))

    async def test_a_lost_secret_matters_only_when_something_is_fetched(self, management, image):
        login = {"registry_user": "me", "registry_password": "pass-word"}
        made = (await post(management, image=image, **login)).json()
        management.service.images.logins = RegistryLogins(InstallationSecret(b"2" * 32))
        assert (await self.change(management, made, env={"A": "1"}))["version"] == 2
        path = f"/pilotlight/v1/endpoints/{made['id']}"
        answer = await management.http.patch(path, json={"image": "localhost/pilotlight-none:1"})
        assert answer.status_code == 422
        assert "deploy again with the password" in answer.text

    async def test_images_that_are_here_wait_for_no_fetch(self, management, image):
        for _ in range(PULLS_MAX):
            await management.service.images._pulling.acquire()
        async with asyncio.timeout(60):
            assert (await post(management, image=image)).status_code == 201

    async def test_a_named_volume_that_is_missing_is_told(self, management, image):
        volumes = [{"source": "misspelt", "target": "/x"}]
        body = {"kind": "queue", "image": image, "volumes": volumes}
        headers = {"Accept": "application/x-ndjson"}
        answer = await management.http.post("/pilotlight/v1/endpoints", json=body, headers=headers)
        assert "volume misspelt does not exist yet" in answer.text

    async def test_what_was_computed_for_processes_does_not_go_into_an_image(self, management, image):
        made = await management.create(env={"MAX_MODEL_LEN": "64"})
        assert set(made["env"]) - {"MAX_MODEL_LEN", "MODEL_NAME"}
        changed = await self.change(management, made, image=image)
        assert changed["env"] == {"MAX_MODEL_LEN": "64", "MODEL_NAME": made["model"]}

    async def test_what_cannot_be_revised(self, management, image):
        made = (await post(management, command=["sh", "-c", "exit"])).json()
        path = f"/pilotlight/v1/endpoints/{made['id']}"
        for body, sentence in (
            ({"volumes": []}, "volumes belongs to an image"),
            ({"image": image, "registry_user": "me"}, "belong together"),
            ({"image": None}, "image"),
        ):
            answer = await management.http.patch(path, json=body)
            assert answer.status_code in {400, 422}, (body, answer.text)
            assert sentence in answer.text

    async def test_rest_v2_shows_the_image(self, management, image):
        made = (await post(management, image=image)).json()
        assert (await management.http.get(f"/v2/serverless/{made['id']}")).json()["image"] == image

    async def test_an_image_that_knows_no_command(self, management, podman):
        management.container_engine._url = podman.url
        bare = podman.build("bare", "FROM scratch\nCOPY unused /unused\n", {"unused": ""})
        answer = await post(management, image=bare)
        assert answer.status_code in {400, 422}
        assert "neither CMD nor ENTRYPOINT" in answer.text
        assert (await post(management, image=bare, command=["/x"])).status_code == 201


class TestGpus:
    """Images of our worker tell what their engine is built for (vllm-worker.md §4.6)."""

    @pytest.fixture
    def image(self, podman, management, gpu_host):
        management.container_engine._url = podman.url
        management.surroundings["host"] = gpu_host
        manifest = {
            "format": MANIFEST_FORMAT, "vllm": "0.32.0", "torch": "2.13.0+cu130", "platform": "cuda",
            "architectures": [], "registered": {}, "quantizations": {},
            "flags": {
                "TENSOR_PARALLEL_SIZE": {
                    "flag": "--tensor-parallel-size", "kind": "value", "multi": False, "choices": None,
                    "value": "int", "short": [],
                },
            },
        }  # fmt: skip
        text = f"FROM {podman.base()}\nCOPY {MANIFEST_NAME} /engine/\nENV PILOTLIGHT_ENGINE_HOME=/engine\n"
        files = {MANIFEST_NAME: json.dumps(manifest)}
        return podman.build("gpu", f'{text}CMD ["true"]\n', files)

    async def test_as_many_as_its_engine_needs(self, management, image):
        one = await post(management, kind="vllm", image=image, model="Org/Tiny")
        assert (one.status_code, one.json()["gpu_count"]) == (201, 1), one.text
        env = {"TENSOR_PARALLEL_SIZE": "2"}
        two = await post(management, kind="vllm", image=image, model="Org/Tiny", env=env)
        assert two.json()["gpu_count"] == 2
        for gpus, sentence in ((0, "gpu_count is 0"), (1, "asks for 2 parallel ranks"), (3, "has 2 GPUs")):
            answer = await post(
                management, kind="vllm", image=image, model="Org/Tiny", env=env, gpu_count=gpus
            )
            assert answer.status_code == 422
            assert sentence in answer.text

    async def test_a_machine_without_any_cannot_have_it(self, management, image):
        host = management.surroundings["host"]
        management.surroundings["host"] = replace(host, gpus=())
        answer = await post(management, kind="vllm", image=image, model="Org/Tiny")
        assert answer.status_code == 422
        assert "gpu_count is 1, but this host has 0 GPUs" in answer.text

    async def test_a_revision_keeps_what_it_had_and_a_process_gets_what_it_needs(self, management, image):
        two = await post(management, kind="vllm", image=image, model="Org/Tiny", gpu_count=2)
        path = f"/pilotlight/v1/endpoints/{two.json()['id']}"
        assert (await management.http.patch(path, json={"env": {"X": "1"}})).json()["gpu_count"] == 2
        made = await management.create()
        path = f"/pilotlight/v1/endpoints/{made['id']}"
        assert (await management.http.patch(path, json={"image": image})).json()["gpu_count"] == 1

    async def test_other_programs_get_what_they_ask_for(self, management, image):
        assert (await post(management, image=image)).json()["gpu_count"] == 0


class TestLogins:
    CONTAINER = Container(image=IMAGE, registry_user="me", registry_password="word")

    def test_sealed_for_one_endpoint_by_one_secret(self):
        logins = RegistryLogins(InstallationSecret(b"1" * 32))
        sealed = logins.seal("e1", self.CONTAINER)
        assert logins.of("e1", sealed).password == "word"
        for reader, endpoint_id in ((logins, "e2"), (RegistryLogins(InstallationSecret(b"2" * 32)), "e1")):
            with pytest.raises(PullError, match="deploy again with the password"):
                reader.of(endpoint_id, sealed)

    def test_anybody(self):
        logins = RegistryLogins(InstallationSecret(b"1" * 32))
        nobody = replace(self.CONTAINER, registry_user="", registry_password="")
        assert logins.seal("e", nobody) == nobody
        assert logins.of("e", nobody) is None


async def test_a_machine_without_a_container_engine_says_so(management, monkeypatch, tmp_path):
    """Nothing to wait for, unlike an engine that does not answer: 422, not 503."""
    monkeypatch.setattr("pilotlight.clusters.container_engine.SOCKETS", (str(tmp_path / "none.sock"),))
    for name in ("DOCKER_HOST", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(management.service.images, "_engine", ContainerEngine())
    answer = await post(management, image=IMAGE)
    assert answer.status_code == 422
    assert "no container engine" in answer.text
