"""Which permission a method needs, and which roles give it (cloud.google.com/iam/docs/roles-permissions)."""

from typing import Any

from rehearsal.refusal import Refusal

NEEDS: dict[str, tuple[str, ...]] = {
    "compute.projects.get": ("compute.projects.get",),
    "compute.projects.setCommonInstanceMetadata": ("compute.projects.setCommonInstanceMetadata",),
    "compute.globalOperations.get": ("compute.globalOperations.get",),
    "compute.zoneOperations.get": ("compute.zoneOperations.get",),
    "compute.instances.list": ("compute.instances.list",),
    "compute.instances.get": ("compute.instances.get",),
    "compute.instances.insert": ("compute.instances.create", "compute.disks.create", "compute.subnetworks.use"),
    "compute.instances.setLabels": ("compute.instances.setLabels",),
    "compute.instances.delete": ("compute.instances.delete",),
    "tpu.projects.locations.nodes.list": ("tpu.nodes.list",),
    "tpu.projects.locations.nodes.get": ("tpu.nodes.get",),
    "tpu.projects.locations.nodes.create": ("tpu.nodes.create",),
    "tpu.projects.locations.nodes.patch": ("tpu.nodes.update",),
    "tpu.projects.locations.nodes.delete": ("tpu.nodes.delete",),
    "tpu.projects.locations.operations.get": ("tpu.operations.get",),
    "cloudresourcemanager.projects.get": ("resourcemanager.projects.get",),
    "cloudresourcemanager.projects.getIamPolicy": ("resourcemanager.projects.getIamPolicy",),
    "cloudresourcemanager.projects.setIamPolicy": ("resourcemanager.projects.setIamPolicy",),
    "iam.projects.serviceAccounts.get": ("iam.serviceAccounts.get",),
    "iam.projects.serviceAccounts.create": ("iam.serviceAccounts.create",),
}
ACT_AS = "iam.serviceAccounts.actAs"  # to start a machine with a service account

# Role -> beginnings of the permissions that it gives, and those that it lacks in spite of that.
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "roles/owner": (("",), ()),
    "roles/editor": (("",), ("resourcemanager.projects.setIamPolicy",)),
    "roles/viewer": (("compute.projects.get", "compute.instances.list", "resourcemanager.projects.get"), ()),
    "roles/compute.admin": (("compute.", "resourcemanager.projects.get"), ()),
    "roles/tpu.admin": (("tpu.", "resourcemanager.projects.get"), ()),
    "roles/iam.serviceAccountUser": ((ACT_AS, "iam.serviceAccounts.get", "iam.serviceAccounts.list"), ()),
    "roles/iam.roleViewer": (("iam.roles.",), ()),
    "roles/storage.objectAdmin": (("storage.objects.",), ()),
}


def allowed(policy: dict[str, Any], member: str, permission: str) -> bool:
    for binding in policy["bindings"]:
        gives, lacks = ROLES[binding["role"]]
        if member in binding["members"] and permission.startswith(gives) and permission not in lacks:
            return True
    return False


def demand(policy: dict[str, Any], member: str, permission: str, resource: str) -> None:
    """Raises Refusal if the project does not give this permission to the member."""
    if not allowed(policy, member, permission):
        raise Refusal(403, f"Required '{permission}' permission for '{resource}'", "forbidden")
