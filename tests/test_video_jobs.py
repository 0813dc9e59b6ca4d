"""Videos by `/v1/videos`: jobs that the unmodified openai client asks for, follows and fetches."""

import json
import threading

import numpy as np
import openai
import pytest
from images_api import SECONDS, alone, asked, client_of, ended, frames_of, got, models_over, serving, until
from pipelines_with_parts import PROMPT

from taylorseer_export.embedded.requests import prompt_request
from taylorseer_export.embedded.video import write_video
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.serve.api import videos
from taylorseer_export.serve.api.prompts import check_draws
from taylorseer_export.serve.api.settings import Settings

# OpenAI itself no longer makes videos; its client and this form of jobs are what others go on with.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

SIZE = (9, 32, 48)
HOW = {"seed": 3, "frames": 9, "plan": "FF", "order": 0, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def wan(whole):
    return whole("wan")[1]


@pytest.fixture
def port(wan):
    with models_over(wan, slots=1, queue=1, workers=1) as models, serving(models) as port:
        yield port


@pytest.fixture
def held(monkeypatch):
    """While it is not set, no engine call ends."""
    run, event = Slot.run, threading.Event()

    def waiting(slot):
        assert event.wait(SECONDS)
        run(slot)

    monkeypatch.setattr(Slot, "run", waiting)
    yield event
    event.set()


def test_the_openai_client_gets_the_video_of_a_solo_run(port, wan, tmp_path):
    client = client_of(port)
    job = client.videos.create(prompt=PROMPT, model="wan-whole", size="48x32", extra_body=HOW)
    assert (job.object, job.size, job.prompt, job.model) == ("video", "48x32", PROMPT, "wan-whole")
    assert job.status in ("queued", "in_progress", "completed") and job.error is None
    done = ended(client, job.id)
    assert (done.status, done.progress, done.seconds) == ("completed", 100, f"{9 / 16:g}")
    assert done.created_at <= done.completed_at < done.expires_at
    told = done.model_extra["taylorseer"]
    assert (told["frames"], told["seed"], told["planned"], told["executed"]) == (9, 3, "FF", "FF")
    request = prompt_request(wan, [PROMPT], [3], SIZE, 1.0)
    expected, _ = alone(wan, request, plan="FF", order=0)
    write_video(tmp_path / "expected.mp4", expected, 16)
    seen = frames_of(client.videos.download_content(job.id).read())
    assert seen.shape == (*SIZE, 3)
    assert np.array_equal(seen, frames_of((tmp_path / "expected.mp4").read_bytes()))
    other = client.videos.create(prompt=PROMPT, size="48x32", extra_body={**HOW, "seed": 4})
    ended(client, other.id)
    assert not np.array_equal(seen, frames_of(client.videos.download_content(other.id).read()))


def test_jobs_are_listed_followed_and_deleted(port, held):
    client = client_of(port)
    first, second = (client.videos.create(prompt=PROMPT, size="48x32", extra_body=HOW) for _ in range(2))
    assert [job.id for job in client.videos.list()] == [second.id, first.id]
    assert [job.id for job in client.videos.list(order="asc", limit=1)] == [first.id, second.id]  # page by page
    assert [job.id for job in client.videos.list(after=second.id).data] == [first.id]
    with pytest.raises(openai.RateLimitError) as full:  # one runs, one waits
        client.videos.create(prompt=PROMPT, extra_body=HOW)
    assert int(full.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.ConflictError, match="expected completed; ask again later"):
        client.videos.download_content(second.id)
    assert client.videos.delete(second.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(second.id)
    held.set()
    assert ended(client, first.id).status == "completed"
    assert client.videos.delete(first.id).object == "video.deleted"
    assert client.videos.list().data == []


def test_another_key_sees_no_job(wan):
    from taylorseer_export.serve.api.settings import _digest

    with models_over(wan, slots=1, queue=1, workers=1) as models:
        with serving(models, Settings(keys=(_digest("key-of-one"), _digest("key-of-other")))) as port:
            mine, other = client_of(port, "key-of-one"), client_of(port, "key-of-other")
            job = mine.videos.create(prompt=PROMPT, size="48x32", extra_body=HOW)
            assert other.videos.list().data == []
            for call in (other.videos.retrieve, other.videos.delete, other.videos.download_content):
                with pytest.raises(openai.NotFoundError):
                    call(job.id)
            assert ended(mine, job.id).status == "completed"


def test_a_job_that_fails_says_why(port, monkeypatch):
    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(videos, "_write", broken)
    client = client_of(port)
    done = ended(client, client.videos.create(prompt=PROMPT, size="48x32", extra_body=HOW).id)
    assert (done.status, done.error.code) == ("failed", "internal_error")
    assert "its log says why" in done.error.message
    late = client.videos.create(prompt=PROMPT, size="48x32", extra_body={**HOW, "timeout": 1e-3})
    assert ended(client, late.id).error.code == "timeout"


def test_what_is_done_is_kept_for_a_while(port, monkeypatch):
    client = client_of(port)
    monkeypatch.setattr(videos, "_KEPT", 1)
    made = [client.videos.create(prompt=PROMPT, size="48x32", extra_body=HOW).id for _ in range(1)]
    ended(client, made[0])
    made.append(client.videos.create(prompt=PROMPT, size="48x32", extra_body=HOW).id)
    until(lambda: [job.id for job in client.videos.list()] == made[1:] and ended(client, made[1]))
    monkeypatch.setattr(videos, "_KEPT_FOR", -1)
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content(made[1])


def test_what_is_no_request_for_a_video_is_refused(port):
    for body, said in (
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a", "n": 2}, "`n` is given"),
        ({"prompt": "a", "seconds": "4", "frames": 9}, "seconds is given beside frames"),
        ({"prompt": "a", "seconds": "long"}, "seconds is 'long', expected a number"),
        ({"prompt": "a", "seconds": 0}, "seconds is 0, expected a finite number above 0"),
        ({"prompt": "a", "seconds": True}, "seconds is True, expected a number"),
        ({"prompt": "a", "frames": 8}, "frames is 8, expected a multiple of 4 and 1"),
        ({"prompt": "a", "size": "48x31"}, "height is 31, expected a multiple of 8"),
        ({"prompt": "a", "input_reference": {"image_url": "x"}}, "since nothing is fetched here"),
        ({"prompt": "a", "model": "sora-2"}, "model is `sora-2`"),
    ):
        status, _, text = asked(port, "/v1/videos", body)
        assert status in (400, 404) and said in json.loads(text)["error"]["message"], text
    status, _, text = asked(port, "/v1/images/generations", {"prompt": "a"})
    assert status == 404 and "ask /v1/videos" in json.loads(text)["error"]["message"]
    for path, said in (
        ("/v1/videos?limit=0", "limit is 0"),
        ("/v1/videos?order=up", "order is up"),
        ("/v1/videos?after=video_0", "video is `video_0`"),
        ("/v1/videos/video_0", "video is `video_0`"),
    ):
        status, _, text = got(port, path)
        assert status in (400, 404) and said in json.loads(text)["error"]["message"]
    form = b'--xx\r\ncontent-disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\nx\r\n--xx--\r\n'
    status, _, text = asked(port, "/v1/videos", form, {"content-type": "multipart/form-data; boundary=xx"})
    assert status == 400 and "prompt is missing" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(("seconds", "frames"), [("0.5", 9), (0.1, 1), (1, 17), ("0.3", 5)])
def test_seconds_are_the_nearest_number_of_frames(port, seconds, frames):
    body = {"prompt": "a", "size": "32x32", "seconds": seconds, "steps": 1, "seed": 1}
    status, _, text = asked(port, "/v1/videos", body)
    assert status == 200 and json.loads(text)["taylorseer"]["frames"] == frames
    assert json.loads(text)["seconds"] == f"{frames / 16:g}"


def test_a_model_of_videos_needs_a_library_for_them(wan, monkeypatch):
    check_draws(wan.manifest)
    monkeypatch.setattr("taylorseer_export.embedded.video.find_spec", lambda _: None)
    with pytest.raises(Exception, match=r"av is not installed, expected it for videos; pip install"):
        models_over(wan, slots=1).__enter__()


def test_a_model_of_videos_says_so(port):
    (listed,) = client_of(port).models.list().data
    told = listed.model_extra["taylorseer"]
    assert told["frame_rate"] == 16 and told["frames"] > 1
