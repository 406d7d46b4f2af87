"""Requests come, stream, stop, are cancelled and time out; no block is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest
from drivetrain_inference import (
    AsyncEngine,
    EngineStoppedError,
    QueueFullError,
    SamplingParams,
    serve,
)
from drivetrain_inference.loading import load_tokenizer
from tiny_decoders import VOCABULARY, decoder

from drivetrain.errors import ConfigError

OPTIONS = {"block_size": 4, "max_batch_tokens": 24, "max_sequences": 6, "cache_blocks": 20}


def engine(**options):
    return serve(decoder(), {"inference": {**OPTIONS, **options}})


class Letters:
    """A tokenizer of one character a token."""

    def __call__(self, text):
        return {"input_ids": [ord(each) - 32 for each in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(32 + token) for token in tokens)


@pytest.mark.parametrize("host", [0, 1 << 14])
def test_500_random_requests_leak_no_block(host):
    draw = random.Random(1)
    with engine(host_cache_bytes=host) as found:
        room = found.scheduler.host.free if host else 0
        alive, ended = set(), 0
        for number in range(500):
            params = SamplingParams(
                max_new_tokens=draw.randrange(1, 20), n=draw.choice((1, 1, 1, 3)),
                temperature=draw.choice((0.0, 1.0)),
            )  # fmt: skip
            length = draw.choice((3, 9, 30))
            prompt = [draw.randrange(VOCABULARY if number % 3 else 2) for _ in range(length)]
            alive.add(found.add(prompt, params, timeout=draw.choice((None, None, 0.0))))
            if draw.random() < 0.2:
                found.cancel(draw.choice(sorted(alive)))
            for _ in range(draw.randrange(4)):
                ended += sum(each.completion is not None for each in found.step())
            if number % 50 == 0:
                found.scheduler.blocks.check(each.table for each in found.scheduler)
        while found.busy:
            found.step()
        assert found.scheduler.preemptions > 0
        assert ended > 100
        found.scheduler.blocks.check([])
        assert found.ragged.free_blocks == 20
        if host:
            assert found.scheduler.swaps > 0
            assert found.scheduler.host.free == room


def test_results_of_one_prompt_share_it_and_differ():
    params = SamplingParams(max_new_tokens=12, temperature=1.5, n=4, seed=5)
    with engine(cache_blocks=40) as found:
        (results,) = found.generate([[7] * 10], params)
        assert len({result.tokens for result in results}) == 4
        assert found.generate([[7] * 10], params) != [[]]
        # One after another, as there is no room for more, they are the same.
    with engine(max_sequences=1) as found:
        assert [r.tokens for r in found.generate([[7] * 10], params)[0]] == [
            r.tokens for r in results
        ]


def test_streamed_text_is_the_text():
    with serve(decoder(), {"inference": OPTIONS}, tokenizer=Letters()) as found:
        whole = found.generate(["Hello"], SamplingParams(max_new_tokens=15))[0][0]
        streamed = list(found.stream("Hello", SamplingParams(max_new_tokens=15)))
        assert "".join(each.text for each in streamed) == whole.text
        assert [each.token for each in streamed] == list(whole.tokens)
        assert streamed[-1].completion.tokens == whole.tokens


def test_a_stop_text_ends_a_result_and_is_never_shown():
    with serve(decoder(), {"inference": OPTIONS}, tokenizer=Letters()) as found:
        whole = found.generate(["Hello"], SamplingParams(max_new_tokens=15))[0][0]
        stop = whole.text[6:9]
        place = whole.text.find(stop)
        params = SamplingParams(max_new_tokens=15, stop=stop)
        streamed = list(found.stream("Hello", params))
        assert streamed[-1].completion.finish_reason == "stop"
        assert streamed[-1].completion.text == whole.text[:place]
        assert "".join(each.text for each in streamed) == whole.text[:place]
        assert len(streamed) == place + 3


def test_stop_tokens_end_a_result():
    with engine() as found:
        whole = found.generate([[1, 2]], SamplingParams(max_new_tokens=10))[0][0].tokens
        params = SamplingParams(max_new_tokens=10, stop_tokens=(whole[4],))
        stopped = found.generate([[1, 2]], params)[0][0]
        end = whole.index(whole[4]) + 1
        assert (stopped.tokens, stopped.finish_reason) == (whole[:end], "stop")


def test_a_deadline_ends_with_what_there_is():
    with engine() as found:
        number = found.add([1, 2], SamplingParams(max_new_tokens=10), timeout=0)
        (progress,) = found.step()
        assert (progress.request, progress.completion.finish_reason) == (number, "deadline")
        assert not found.busy


def test_a_full_queue_refuses():
    with engine(max_waiting=2) as found:
        short = SamplingParams(max_new_tokens=4)
        found.add([1], short)
        found.add([2], short)
        with pytest.raises(QueueFullError, match=r"raise inference\.max_waiting"):
            found.add([3], short)
        assert len(found.generate([[4]] * 5, SamplingParams(max_new_tokens=2))) == 5


def test_tasks_stream_at_once_and_one_that_leaves_is_cancelled():
    async def main():
        served = AsyncEngine(engine(cache_blocks=60))
        params = SamplingParams(max_new_tokens=30)
        alone = await served.generate([5] * 8, params)

        async def leaves():
            async for _ in served.stream([6] * 8, params):
                return

        results = await asyncio.gather(
            *(served.generate([5] * 8, params) for _ in range(4)), leaves()
        )
        assert all(result[0].tokens == alone[0].tokens for result in results[:4])
        with pytest.raises(ConfigError, match="the prompt is empty"):
            await served.generate([])
        late = await served.generate([5], params, timeout=0.0)
        assert late[0].finish_reason == "deadline"
        await served.close()
        with pytest.raises(EngineStoppedError, match="it was closed"):
            await served.generate([5], params)
        served.engine.scheduler.blocks.check([])

    asyncio.run(main())


def test_an_error_of_the_thread_reaches_every_task():
    async def main():
        served = AsyncEngine(engine())

        def broken(*_):
            raise ValueError("a broken model")

        served.engine.ragged.run = broken
        short = SamplingParams(max_new_tokens=4)
        waiting = [served.generate([1], short), served.generate([2], short)]
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, EngineStoppedError)
        with pytest.raises(EngineStoppedError, match="a broken model"):
            await served.generate([1], short)
        await served.close()

    asyncio.run(main())


def test_code_of_a_tokenizer_is_neither_run_nor_asked_for(tmp_path, monkeypatch, caplog):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    trace = tmp_path / "was_run"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}'
    )
    assert load_tokenizer(tmp_path) is None
    assert "has no tokenizer that loads" in caplog.text
    assert asked == []
    assert not trace.exists()
