"""Cloud Resource Manager v1 and IAM v1: the project, its policy, its service accounts; and access tokens of OAuth 2."""

import re
import secrets
from collections.abc import Mapping

from rehearsal.books import OWNER, Books, lookup
from rehearsal.call import Call, Handler, Json
from rehearsal.refusal import Refusal

REFRESH_TOKEN = "1//rehearsal"  # of the user, as `gcloud auth application-default login` writes one into a file
TOKEN_LIFE_S = 3600


def get_project(books: Books, call: Call) -> Json:
    project = books.project
    return {
        "projectId": project.id,
        "projectNumber": str(project.number),
        "name": project.id,
        "lifecycleState": "ACTIVE",
    }


def get_policy(books: Books, call: Call) -> Json:
    return {**books.project.policy, "etag": "BwXrehearsal"}


def set_policy(books: Books, call: Call) -> Json:
    policy = call.body["policy"]
    if policy.get("etag") not in (None, "BwXrehearsal"):
        raise Refusal(409, "There were concurrent policy changes. Please retry the whole read-modify-write.")
    for binding in policy["bindings"]:
        for member in binding["members"]:
            kind, _, email = member.partition(":")
            if kind == "serviceAccount" and email not in books.project.accounts:
                raise Refusal(400, f"Service account {email} does not exist.")
    books.project.policy = policy
    return get_policy(books, call)


def get_account(books: Books, call: Call) -> Json:
    return lookup(books.project.accounts, call["name"].rpartition("/")[2], call["name"])


def create_account(books: Books, call: Call) -> Json:
    id = call.body.get("accountId", "")
    if not re.fullmatch("[a-z]([-a-z0-9]{4,28}[a-z0-9])", id):
        raise Refusal(400, f"Invalid service account id: {id!r}")
    email = f"{id}@{books.project.id}.iam.gserviceaccount.com"
    if email in books.project.accounts:
        raise Refusal(409, f"Service account {id} already exists within project projects/{books.project.id}.")
    books.project.accounts[email] = {
        "name": f"projects/{books.project.id}/serviceAccounts/{email}",
        "projectId": books.project.id,
        "email": email,
        "uniqueId": str(10**20 + books.number()),
        **call.body.get("serviceAccount", {}),
    }
    return books.project.accounts[email]


def user_token(books: Books, form: Mapping[str, str]) -> Json:
    """Answers oauth2.googleapis.com/token for the credentials of a user."""
    if form.get("grant_type") != "refresh_token" or form.get("refresh_token") != REFRESH_TOKEN:
        raise Refusal(401, "invalid_grant: Token has been expired or revoked.")
    return token_for(books, OWNER)


def token_for(books: Books, member: str) -> Json:
    token = f"ya29.{secrets.token_urlsafe(24)}"
    books.tokens[token] = member
    return {"access_token": token, "expires_in": TOKEN_LIFE_S, "token_type": "Bearer"}


METHODS: dict[str, Handler] = {
    "cloudresourcemanager.projects.get": get_project,
    "cloudresourcemanager.projects.getIamPolicy": get_policy,
    "cloudresourcemanager.projects.setIamPolicy": set_policy,
    "iam.projects.serviceAccounts.get": get_account,
    "iam.projects.serviceAccounts.create": create_account,
}
