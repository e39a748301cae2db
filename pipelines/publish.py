"""Publish a finished cache to the model hub, a bucket or a folder."""

from pipelines.command import Command, Given, JsonOutput, run
from scalekd_cache.config.options import build, take
from scalekd_cache.config.publishing import PublishConfig


def main(given: Given) -> None:
    """Publish the cache, then print commands that use it."""
    output = take(given, JsonOutput)
    config = build(PublishConfig, given)
    from scalekd_cache.progress import size_text
    from scalekd_cache.publishing.publish import publish

    facts: dict[str, object] = {}
    with output.printed(facts):
        found = publish(config)
        facts.update(found)
        print(
            f"{found['to']}: {size_text(found['bytes'])}, {size_text(found['bytes_sent'])} transferred by this command"
        )
        if found["local_paths"]:
            print(
                "note: manifest.json is published unchanged and contains these local paths: "
                f"{', '.join(found['local_paths'])}"
            )
        for command in found["next"]:
            print(f"  {command}")


COMMAND = Command("publish", main, [PublishConfig, JsonOutput], __doc__)

if __name__ == "__main__":
    run(COMMAND)
