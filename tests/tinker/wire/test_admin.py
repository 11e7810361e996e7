"""Replies of the service-wide endpoints, read by the SDK's own types."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from tinker import types
from tinker.cli.auth_api import SelfApiKeyResponse

from tx.tinker.wire import admin

HOUR = datetime(2026, 7, 13, 5, tzinfo=UTC)


def read(sdk_type, reply):
    """What the SDK makes of a reply as it goes over the wire."""
    return sdk_type.model_validate_json(reply.model_dump_json(exclude_none=True))


@pytest.mark.parametrize(
    ("info", "sdk_type"),
    [
        (admin.TrainingUsage(token_count=5), types.TrainingBillingEvent),
        (admin.PrefillUsage(cached=True, token_count=5), types.SamplingPrefillBillingEvent),
        (admin.SampleUsage(token_count=5), types.SamplingSampleBillingEvent),
        (admin.CheckpointUsage(count=5), types.CheckpointBillingEvent),
        (admin.StorageUsage(gigabyte_hours=0.5), types.StorageBillingEvent),
    ],
)
def test_each_kind_of_usage_is_the_sdks(info, sdk_type):
    event = admin.UsageEvent(bucket_start=HOUR, bucket_end=HOUR + timedelta(hours=1), session_id="s", event_info=info)
    sessions = {"s": admin.UsageSession(user_metadata={"a": "b"})}
    usage = read(types.BillingUsageResponse, admin.Usage(data=[event], sessions=sessions))
    assert usage.data[0].bucket_start == HOUR
    assert isinstance(usage.data[0].event_info, sdk_type)
    assert usage.data[0].event_info.model_dump() == info.model_dump()
    assert usage.sessions["s"].user_metadata == {"a": "b"}


def test_storage_audit_and_keys_are_the_sdks():
    item = admin.StorageItem(checkpoint_count=2, size_bytes=10**9, size_gigabytes=1.0, estimated_monthly_cost_usd=0.5)
    storage = read(
        types.CurrentCheckpointStorageUsageResponse,
        admin.CheckpointStorage(data=[item], effective_rate_usd_per_gigabyte_month=0.5),
    )
    assert (storage.data[0].size_bytes, storage.data[0].project_id) == (10**9, None)
    entry = admin.AuditEntry(timestamp=HOUR, event="checkpoint_publish", event_details={"actor": "local"})
    log = read(types.AuditLogResponse, admin.AuditLog(entries=[entry]))
    assert (log.entries[0].timestamp, log.entries[0].event_details) == (HOUR, {"actor": "local"})
    details = admin.KeyDetails(org_details=admin.Named(name="o"), user_details=admin.Mailbox(email="e"))
    key = read(SelfApiKeyResponse, admin.ApiKey(key_id=1, name="n", note="x", details=details))
    assert (key.details.org_details.name, key.details.user_details.email) == ("o", "e")


def test_the_sdk_has_no_client_flag_that_is_left_to_its_default():
    assert set(types.ClientConfigResponse.model_fields) <= set(admin.ClientConfig.model_fields)
    assert set(types.ClientDynamicConfigResponse.model_fields) <= set(admin.ClientDynamicConfig.model_fields)
